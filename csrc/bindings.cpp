// multilora._C: the kernels for the CPU.
#include "bindings.h"

#include <optional>
#include <tuple>

#include "cpu/geometry.h"
#include "cpu/levels.h"
#include "cpu/low_rank.h"
#include "cpu/volume.h"

namespace py = pybind11;

namespace multilora {

Level level = Level::scalar;

namespace {

const char* const kNames[] = {"scalar", "avx2", "avx512"};

// The compiled instruction sets that this CPU can run, the best last.
std::vector<std::string> supported_levels() {
  std::vector<std::string> names{kNames[0]};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back(kNames[1]);
  if (names.size() == 2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    names.push_back(kNames[2]);
  }
#endif
  return names;
}

void set_level(const std::string& name) {
  std::vector<std::string> names = supported_levels();
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) {
      level = static_cast<Level>(i);
      return;
    }
  }
  throw std::invalid_argument("this CPU cannot run the level " + name);
}

// The arguments are those of multilora._C_cuda, so that one function in Python calls both. These
// kernels allocate their own workspace; `where` is the number of threads.
void traces(const View& out, const Factors& factors, const Scalings& scaling, const View&,
            bool distance, int threads) {
  Adapters adapters{factors.dtype, factors.particles, distance, false};
  geometry(adapters, layers_of_traces(factors, scaling, out), threads);
}

void factor_gradients(const Addresses& outs, const View& upstream, const Factors& factors,
                      const Scalings& scaling, const View& mix, const Addresses& grads, const View&,
                      int threads) {
  Adapters adapters{factors.dtype, factors.particles, false, mix.dims == 3};
  geometry(adapters, layers_of_gradients(factors, scaling, outs, upstream, mix, grads), threads);
}

// Fills value, or nll, divergence and count.
int64_t forward(const View& logits, const View& targets, const View& value,
                const std::optional<std::tuple<View, View, View>>& means, const Saved& saved,
                double eps, bool det, int threads) {
  auto p = volume_of<CpuVolumeForward>(logits, targets, saved);
  if (value.data) expect("value", value, {p.N});
  VolumeMeans sums{};
  if (means) {
    const auto& [nll, divergence, count] = *means;
    expect("nll", nll, {p.K});
    expect("divergence", divergence, {});
    expect("count", count, {});
    sums = {nll.data, divergence.data, count.data};
  }
  p.value = value.data;
  p.eps = eps;
  p.kind = volume_kind(det, p.K, p.C);
  return volume_forward(p, sums, logits.dtype, threads);
}

void backward(const View& logits, const View& targets, const Saved& saved, const View& grad,
              const View& grad_nll, const View& count, const View& out, int threads) {
  auto p =
      volume_gradient_of<CpuVolumeBackward>(logits, targets, saved, grad, grad_nll, count, out);
  volume_backward(p, logits.dtype, threads);
}

// What a Part is in Python, multilora/ops/common.py.
using PartOfPython = std::tuple<int64_t, int64_t, int64_t, int64_t, double>;

// Python makes them once for many layers: it takes as long as a small layer's kernel.
struct Parts {
  explicit Parts(const std::vector<PartOfPython>& parts) {
    for (const auto& [particle, first, last, rank, scaling] : parts) {
      list.push_back({particle, first, last, rank, scaling});
    }
  }
  std::vector<Part> list;
};

// Python makes the tensors contiguous, but for the rows of x. start: y itself, a bias, or None.
void low_rank_linear(const View& y, const View& start, const View& x, const View& lora_A,
                     const View& lora_B, const View& shrunk, const Parts& parts, int threads) {
  int64_t T = x.sizes[0], K = lora_A.sizes[0], rank = lora_A.sizes[1];
  int64_t d_in = x.sizes[1], d_out = y.sizes[1], done = 0;
  expect("x", x, {T, d_in});
  expect("y", y, {T, d_out});
  expect("lora_A", lora_A, {K, rank, d_in});
  expect("lora_B", lora_B, {K, d_out, rank});
  if (start.data && start.data != y.data) expect("start", start, {d_out});
  if (shrunk.data) expect("shrunk", shrunk, {T, rank});
  bool same = x.dtype == DType::f32 || x.dtype == DType::f64;
  for (const View* t : {&y, &start, &lora_A, &lora_B, &shrunk}) {
    same = same && (!t->data || t->dtype == x.dtype);
  }
  if (!same) throw std::invalid_argument("multilora: the tensors need one dtype, of 4 or 8 bytes");
  for (const Part& part : parts.list) {
    bool fits = 0 <= part.particle && part.particle < K && done <= part.first &&
                part.first <= part.last && part.last <= T && 0 <= part.rank && part.rank <= rank;
    if (!fits) throw std::invalid_argument("multilora: a part lies outside of the tensors");
    done = part.last;
  }
  LowRank p{x.data, lora_A.data, lora_B.data, start.data, y.data,      shrunk.data,
            T,      d_in,        d_out,       rank,       x.strides[0]};
  low_rank(p, parts.list, x.dtype, threads);
}

}  // namespace
}  // namespace multilora

PYBIND11_MODULE(_C, m) {
  using namespace multilora;
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "multilora's kernels for the CPU";
  set_level(supported_levels().back());
  m.def("supported_levels", &supported_levels);
  m.def("set_level", &set_level);
  m.def("level", [] { return kNames[static_cast<int>(level)]; });
  m.def("build_info", [] { return py::dict(py::arg("compiler") = "C++ " __VERSION__); });
  m.def("traces", &traces, py::arg("out"), py::arg("factors"), py::arg("scaling"),
        py::arg("workspace"), py::kw_only(), py::arg("distance"), py::arg("where"), release());
  m.def("factor_gradients", &factor_gradients, py::arg("outs"), py::arg("upstream"),
        py::arg("factors"), py::arg("scaling"), py::arg("mix"), py::arg("grads"),
        py::arg("workspace"), py::kw_only(), py::arg("where"), release());
  m.def("volume_forward", &forward, py::arg("logits"), py::arg("targets"), py::arg("value"),
        py::arg("means"), py::arg("saved"), py::kw_only(), py::arg("eps"), py::arg("det"),
        py::arg("where"), release());
  m.def("volume_backward", &backward, py::arg("logits"), py::arg("targets"), py::arg("saved"),
        py::arg("grad"), py::arg("grad_nll"), py::arg("count"), py::arg("out"), py::kw_only(),
        py::arg("where"), release());
  py::class_<Parts>(m, "Parts").def(py::init<const std::vector<PartOfPython>&>());
  m.def("low_rank", &low_rank_linear, py::arg("y"), py::arg("start"), py::arg("x"),
        py::arg("lora_A"), py::arg("lora_B"), py::arg("shrunk"), py::arg("parts"), py::kw_only(),
        py::arg("where"), release());
}
