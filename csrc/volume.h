// The maths of gram_volume and particle_loss that the CPU's and the GPU's kernels share. The
// formulas are in multilora/ops/reference.py.
//
// V is what one member of a group computes in: a number on a GPU; a vector on the CPU, whose lanes
// are examples here. What an example's classes leave is K·(K + 3)/2 + K numbers; they, and all that
// follows, are float64. So are the products that the Gram matrix is a sum of, and, where the sides
// are classes, all of the example; reference.py says why.
#pragma once

#include <math.h>

#include "common.h"

#ifdef __CUDACC__
#define MULTILORA_UNROLL _Pragma("unroll")
#else
#define MULTILORA_UNROLL
#endif

namespace multilora {

// "zero" where no direction is left to differ in: two classes, or "det" with K > C − 1.
enum class VolumeKind : int { zero = 0, logdet = 1, det = 2 };

constexpr VolumeKind volume_kind(bool det, int64_t K, int64_t C) {
  if (C == 2 || (det && K > C - 1)) return VolumeKind::zero;
  return det ? VolumeKind::det : VolumeKind::logdet;
}

constexpr int64_t kIgnored = -100;

MULTILORA_HD float exp(float x) { return ::expf(x); }
MULTILORA_HD double exp(double x) { return ::exp(x); }
MULTILORA_HD double log(double x) { return ::log(x); }
MULTILORA_HD double sqrt(double x) { return ::sqrt(x); }

template <class T>
MULTILORA_HD T where(bool condition, T a, T b) {
  return condition ? a : b;
}

// A NaN in b leaves a: it comes back from exp(b − max), and there it stays in its example.
template <class T>
MULTILORA_HD T max(T a, T b) {
  return a < b ? b : a;
}

// A place in the lower triangle of a symmetric matrix, j <= i.
MULTILORA_HD int64_t lower(int64_t i, int64_t j) { return i * (i + 1) / 2 + j; }

// top, or 0 where nothing has been seen yet: −∞ − (−∞) has no value.
template <class V>
MULTILORA_HD V finite(V top) {
  return where(top == V(-INFINITY), V(0), top);
}

// What turns sums of exp(z − top) into sums of exp(z − highest).
template <class V>
MULTILORA_HD V shrink(V top, V highest) {
  return exp(top - finite(highest));
}

// −log p_y = log(1 + Σe / exp(z_y − top)) = log(1 + exp x), without loss for any x.
template <class V>
MULTILORA_HD V cross_entropy(V top, V rest, V own) {
  V x = log(rest) + (top - own);
  V small = exp(where(V(0) < x, -x, x));
  V one = V(1) + small;
  // What rounding took from 1 + small is given back in proportion.
  V log1p = where(one == V(1), small, log(one) * (small / (one - V(1))));
  return where(V(0) < x, x, V(0)) + log1p;
}

// The numbers of one example (of one in every lane), j <= i. column and swept are for scratch.
template <class V>
struct Example {
  V* top;   // (K)
  V* rest;  // (K)
  V* norm;  // (K): ‖e‖², then ‖e‖
  V* own;   // (K): z_y
  // (side·(side + 1)/2): the Gram matrix of e without its diagonal, then G, or that of the classes
  // of f̃; in the end core.
  V* matrix;
  V* column;  // (side)
  V* swept;   // (side)
};

// Sweeps row and column p of a symmetric positive semidefinite matrix; after all of them the matrix
// is minus its inverse. -> the pivot, no smaller than `floor`, whose product is the determinant.
template <class V, class Group>
MULTILORA_HD V sweep(const Group& group, V* matrix, V* column, int side, int p, double floor) {
  for (int i = group.rank(); i < side; i += group.size()) {
    column[i] = matrix[i < p ? lower(p, i) : lower(i, p)];
  }
  group.sync();
  V pivot = where(column[p] < V(floor), V(floor), column[p]);
  V inverse = V(1) / pivot;
  for (int i = group.rank(); i < side; i += group.size()) {
    V* row = matrix + lower(i, 0);
    V scaled = column[i] * inverse;
    if (i == p) {
      for (int j = 0; j < p; ++j) row[j] = column[j] * inverse;
      row[p] = -inverse;
    } else {
      for (int j = 0; j <= i; ++j) row[j] = j == p ? scaled : row[j] - scaled * column[j];
    }
  }
  group.sync();
  return pivot;
}

// The largest diagonal element that has not been swept. A NaN counts as 0 here, and spoils its
// example when its turn comes.
MULTILORA_HD int largest_pivot(const double* matrix, const double* swept, int side) {
  int best = -1;
  double highest = -1;
  for (int i = 0; i < side; ++i) {
    double size = matrix[lower(i, i)] > 0 ? matrix[lower(i, i)] : 0;
    if (swept[i] == 0 && size > highest) {
      highest = size;
      best = i;
    }
  }
  return best;
}

// What float64 leaves of a pivot that is zero, of a matrix with ones on the diagonal.
MULTILORA_HD double det_floor(int side) { return 1e-15 * side; }

// −log det(I + G/eps); the matrix becomes core.
template <class V, class Group>
MULTILORA_HD V negative_log_det(const Group& group, const Example<V>& x, int side, bool by_class,
                                double eps, double log_eps) {
  V* matrix = x.matrix;
  for (int i = group.rank(); i < side; i += group.size()) {
    matrix[lower(i, i)] = matrix[lower(i, i)] + V(eps);
  }
  group.sync();
  V log_det(0), product(1);
  for (int p = 0; p < side; ++p) {
    product = product * sweep(group, matrix, x.column, side, p, 1e-30);
    // A logarithm for every eight pivots, which are within 1e-30 and 1e7: no product overflows.
    if (p % 8 == 7 || p == side - 1) {
      log_det = log_det + log(product);
      product = V(1);
    }
  }
  if (!by_class) {
    // core − diag(core G), where core (G + eps) = −1
    for (int i = group.rank(); i < side; i += group.size()) {
      V own = matrix[lower(i, i)];
      matrix[lower(i, i)] = own + (V(1) + V(eps) * own);
    }
    group.sync();
  }
  return V(side * log_eps) - log_det;
}

// −det G, also where G is singular: with the largest pivot first, the floor is met only where the
// rest of the matrix is rounding, which is then taken for zero beside the diagonal: it would grow
// from sweep to sweep. The matrix becomes core.
template <class Group>
MULTILORA_HD double negative_det(const Group& group, const Example<double>& x, int side) {
  for (int i = group.rank(); i < side; i += group.size()) x.swept[i] = 0;
  group.sync();
  double det = 1, floor = det_floor(side);
  for (int step = 0; step < side; ++step) {
    int p = largest_pivot(x.matrix, x.swept, side);
    bool rounding = x.matrix[lower(p, p)] < floor;
    group.sync();
    if (group.rank() == 0) x.swept[p] = 1;
    for (int i = group.rank(); rounding && i < side; i += group.size()) {
      if (i != p && x.swept[i] == 0) x.matrix[i < p ? lower(p, i) : lower(i, p)] = 0;
    }
    group.sync();
    det *= sweep(group, x.matrix, x.column, side, p, floor);
  }
  // core − diag(core G), where core = −adj G
  for (int i = group.rank(); i < side; i += group.size()) {
    double* row = x.matrix + lower(i, 0);
    for (int j = 0; j < i; ++j) row[j] *= det;
    row[i] = (row[i] + 1) * det;
  }
  group.sync();
  return -det;
}

// ‖e‖, and where the sides are particles, G from the Gram matrix of e.
template <class V, class Group>
MULTILORA_HD void normalise(const Group& group, const Example<V>& x, int particles, bool gram) {
  for (int i = group.rank(); i < particles; i += group.size()) {
    V squares = x.norm[i];
    x.norm[i] = sqrt(squares);
    if (gram) {
      x.column[i] = V(1) / x.norm[i];
      // 1, or NaN where there is no direction.
      x.matrix[lower(i, i)] = squares / squares;
    }
  }
  group.sync();
  if (!gram) return;
  for (int i = group.rank(); i < particles; i += group.size()) {
    V* row = x.matrix + lower(i, 0);
    for (int j = 0; j < i; ++j) row[j] = row[j] * (x.column[i] * x.column[j]);
  }
  group.sync();
}

// The gradient of −weight·log p_y. The softmax is f̃ · ‖e‖/(Σe + e_y) off the target, and
// p_y − 1 = −Σe/(Σe + e_y) on it. e_y may overflow; p_y is then 1, and the rest of the softmax 0.
template <class V>
struct LossGradient {
  V offset;  // what f̃ is multiplied with off the target
  V on_target;
};

template <class V>
MULTILORA_HD LossGradient<V> loss_gradient(V weight, V top, V norm, V rest, V own) {
  V share = weight / (rest + exp(own - top));
  return {share * norm, -(share * rest)};
}

// Some classes' Σ_j core_ij f_j + offset_i, for `rows` particles i: what f̃_i is multiplied with.
// core is that of the first of them, `next` apart; f those of the first particle, `stride` apart.
template <int rows, class V, class T>
MULTILORA_HD void weigh(V (&x)[rows], const T* core, int64_t next, const V* f, int64_t stride,
                        int particles, const T* offset) {
  MULTILORA_UNROLL
  for (int r = 0; r < rows; ++r) x[r] = V(offset[r]);
  MULTILORA_UNROLL
  for (int j = 0; j < particles; ++j) {
    V fj = f[j * stride];
    MULTILORA_UNROLL
    for (int r = 0; r < rows; ++r) x[r] = x[r] + V(core[r * next + j]) * fj;
  }
}

}  // namespace multilora
