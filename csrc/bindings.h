// How Python's tuples become views and lists of factors, for both modules.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>
#include <utility>
#include <vector>

#include "adapters.h"
#include "view.h"

namespace multilora {

// The values that a forward pass over logits keeps for the backward pass.
struct Saved {
  View stats;  // (3, K, N)
  View core;   // (N, m, m), m = min(K, C)
};

// The parameters that all passes over logits (K, N, C) share.
template <class Parameters>
Parameters volume_of(const View& logits, const View& targets, const Saved& saved) {
  int64_t K = logits.sizes[0], N = logits.sizes[1], C = logits.sizes[2], m = K < C ? K : C;
  expect("logits", logits, {K, N, C});
  expect("targets", targets, {N});
  expect("stats", saved.stats, {3, K, N});
  expect("core", saved.core, {N, m, m});
  Parameters p{};
  p.logits = logits.data;
  p.targets = static_cast<const int64_t*>(targets.data);
  p.stats = saved.stats.data;
  p.core = saved.core.data;
  p.stride_k = logits.strides[0];
  p.stride_n = logits.strides[1];
  p.stride_target = targets.strides[0];
  p.K = decltype(p.K)(K);
  p.N = N;
  p.C = C;
  return p;
}

// The same for a backward pass. grad_nll and count are left out for gram_volume.
template <class Parameters>
Parameters volume_gradient_of(const View& logits, const View& targets, const Saved& saved,
                              const View& grad, const View& grad_nll, const View& count,
                              const View& out) {
  auto p = volume_of<Parameters>(logits, targets, saved);
  expect("out", out, {p.K, p.N, p.C});
  if (grad_nll.data) {
    expect("grad", grad, {});
    expect("grad_nll", grad_nll, {p.K});
    expect("count", count, {});
  } else {
    expect("grad", grad, {p.N});
  }
  p.grad = grad.data;
  p.grad_nll = grad_nll.data;
  p.count = count.data;
  p.out = out.data;
  p.stride_grad = grad.strides[0];
  p.stride_nll = grad_nll.strides[0];
  return p;
}

// A list of integers of any size, or false.
template <class Integer>
bool read_list(PyObject* list, std::vector<Integer>& numbers) {
  if (!PyList_Check(list)) return false;
  numbers.resize(size_t(PyList_GET_SIZE(list)));
  for (size_t i = 0; i < numbers.size(); ++i) {
    PyObject* item = PyList_GET_ITEM(list, Py_ssize_t(i));
    numbers[i] = std::is_signed_v<Integer> ? Integer(PyLong_AsLongLong(item))
                                           : Integer(PyLong_AsUnsignedLongLong(item));
  }
  return true;
}

// Whether all numbers were read; if not, pybind11 raises a TypeError with the arguments.
inline bool no_error() {
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

}  // namespace multilora

namespace pybind11::detail {

// (address, dtype, sizes, strides), made by view() in multilora/ops/native.py; or None.
template <>
struct type_caster<multilora::View> {
  PYBIND11_TYPE_CASTER(multilora::View, const_name("View | None"));

  bool load(handle source, bool) {
    value = {};
    if (source.is_none()) return true;
    PyObject* parts = source.ptr();
    if (!PyTuple_Check(parts) || PyTuple_GET_SIZE(parts) != 4) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(parts, 0));
    value.dtype = multilora::DType(PyLong_AsLong(PyTuple_GET_ITEM(parts, 1)));
    PyObject *sizes = PyTuple_GET_ITEM(parts, 2), *strides = PyTuple_GET_ITEM(parts, 3);
    if (!PyTuple_Check(sizes) || !PyTuple_Check(strides)) return false;
    Py_ssize_t dims = PyTuple_GET_SIZE(sizes);
    if (dims > 3 || PyTuple_GET_SIZE(strides) != dims) return false;
    value.dims = int(dims);
    for (Py_ssize_t i = 0; i < 3; ++i) {
      value.sizes[i] = i < dims ? PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i)) : 1;
      value.strides[i] = i < dims ? PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i)) : 0;
    }
    return multilora::no_error();
  }
};

// (stats, core).
template <>
struct type_caster<multilora::Saved> {
  PYBIND11_TYPE_CASTER(multilora::Saved, const_name("tuple[View, View]"));

  bool load(handle source, bool convert) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) return false;
    make_caster<multilora::View> stats, core;
    if (!stats.load(PyTuple_GET_ITEM(source.ptr(), 0), convert)) return false;
    if (!core.load(PyTuple_GET_ITEM(source.ptr(), 1), convert)) return false;
    value = {stats, core};
    return true;
  }
};

// (dtype, particles, sizes, addresses), made by factors() in multilora/ops/native.py.
template <>
struct type_caster<multilora::Factors> {
  PYBIND11_TYPE_CASTER(multilora::Factors, const_name("Factors"));

  bool load(handle source, bool) {
    PyObject* parts = source.ptr();
    if (!PyTuple_Check(parts) || PyTuple_GET_SIZE(parts) != 4) return false;
    value.dtype = multilora::DType(PyLong_AsLong(PyTuple_GET_ITEM(parts, 0)));
    value.particles = int(PyLong_AsLong(PyTuple_GET_ITEM(parts, 1)));
    return multilora::read_list(PyTuple_GET_ITEM(parts, 2), value.sizes) &&
           multilora::read_list(PyTuple_GET_ITEM(parts, 3), value.addresses) &&
           multilora::no_error();
  }
};

// A list of addresses, or None.
template <>
struct type_caster<multilora::Addresses> {
  PYBIND11_TYPE_CASTER(multilora::Addresses, const_name("list[int] | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    return multilora::read_list(source.ptr(), value.list) && multilora::no_error();
  }
};

}  // namespace pybind11::detail
