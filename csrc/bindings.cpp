// multilora._C: the kernels for the CPU.
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/stl.h>

#include "cpu/bind.h"
#include "cpu/levels.h"

namespace py = pybind11;

namespace multilora {

Level level = Level::scalar;

namespace {

const char* const kNames[] = {"scalar", "avx2", "avx512"};

// What this CPU can run of what was compiled, the best last.
std::vector<std::string> supported_levels() {
  std::vector<std::string> names{kNames[0]};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back(kNames[1]);
  if (names.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
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

}  // namespace
}  // namespace multilora

PYBIND11_MODULE(_C, m) {
  using namespace multilora;
  m.doc() = "multilora's kernels for the CPU";
  set_level(supported_levels().back());
  m.def("supported_levels", &supported_levels);
  m.def("set_level", &set_level);
  m.def("level", [] { return kNames[static_cast<int>(level)]; });
  m.def("build_info", [] { return py::dict(py::arg("compiler") = "C++ " __VERSION__); });
  bind_volume(m);
  bind_geometry(m);
}
