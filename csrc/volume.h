// The maths of gram_volume and particle_loss that the CPU and the GPU share. The formulas are in
// multilora/ops/reference.py.
//
// V is the type in which one member of a group computes: a number on a GPU; on the CPU a vector
// whose lanes are examples. The pass over the classes leaves K·(K + 3)/2 + K numbers per example.
// These numbers and all that follows are float64. So are the products whose sum is the Gram matrix,
// and, where the matrix is over the classes, the whole example; reference.py explains why.
#pragma once

#include <math.h>

#include "common.h"

#ifdef __CUDACC__
#define MULTILORA_UNROLL _Pragma("unroll")
#else
#define MULTILORA_UNROLL
#endif

namespace multilora {

// The volume is "zero" where the particles have no direction in which they could differ: with two
// classes, or with "det" and K > C − 1.
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

// Returns a where b is NaN. The NaN is not lost: exp(b − max) brings it back into its own example.
template <class T>
MULTILORA_HD T max(T a, T b) {
  return a < b ? b : a;
}

// The index of (i, j), j <= i, in the packed lower triangle of a symmetric matrix.
MULTILORA_HD int64_t lower(int64_t i, int64_t j) { return i * (i + 1) / 2 + j; }

// top, or 0 where no class has been seen yet, because −∞ − (−∞) is NaN.
template <class V>
MULTILORA_HD V finite(V top) {
  return where(top == V(-INFINITY), V(0), top);
}

// The factor that turns sums of exp(z − top) into sums of exp(z − highest).
template <class V>
MULTILORA_HD V shrink(V top, V highest) {
  return exp(top - finite(highest));
}

// −log p_y = log(1 + Σe / exp(z_y − top)) = log(1 + exp x), accurate for any x.
template <class V>
MULTILORA_HD V cross_entropy(V top, V rest, V own) {
  V x = log(rest) + (top - own);
  V small = exp(where(V(0) < x, -x, x));
  V one = V(1) + small;
  // Compensate in proportion for what the rounding of 1 + small lost.
  V log1p = where(one == V(1), small, log(one) * (small / (one - V(1))));
  return where(V(0) < x, x, V(0)) + log1p;
}

// The numbers of one example, or of one example per lane. column and swept are scratch memory.
template <class V>
struct Example {
  V* top;   // (K)
  V* rest;  // (K)
  V* norm;  // (K): ‖e‖², then ‖e‖
  V* own;   // (K): z_y
  // (side·(side + 1)/2), lower triangle: first the Gram matrix of e without its diagonal, then G,
  // or F̃ᵀF̃ where the sides are classes; in the end core.
  V* matrix;
  V* column;  // (side)
  V* swept;   // (side)
};

// Sweeps row and column p of a symmetric positive semidefinite matrix. When all have been swept,
// the matrix is minus its inverse. Returns the pivot, at least `floor`; the determinant is the
// product of all pivots.
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

// The place of the largest diagonal element that has not been swept. A NaN counts as 0 here; it
// makes its example NaN when it is swept.
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

// The size of a zero pivot after float64's rounding, in a matrix with a unit diagonal.
MULTILORA_HD double det_floor(int side) { return 1e-15 * side; }

// Returns −log det(I + G/eps); the matrix becomes core.
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
    // Eight pivots share a logarithm: each is between 1e-30 and 1e7, so no product overflows.
    if (p % 8 == 7 || p == side - 1) {
      log_det = log_det + log(product);
      product = V(1);
    }
  }
  if (!by_class) {
    // core − diag(core G), where core (G + eps) = −1.
    for (int i = group.rank(); i < side; i += group.size()) {
      V own = matrix[lower(i, i)];
      matrix[lower(i, i)] = own + (V(1) + V(eps) * own);
    }
    group.sync();
  }
  return V(side * log_eps) - log_det;
}

// Returns −det G, also where G is singular; the matrix becomes core. The largest pivot comes first,
// so a pivot below the floor means that the rest of the matrix is rounding error. It is set to zero
// off the diagonal, because it would grow from sweep to sweep.
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
  // core − diag(core G), where core = −adj G.
  for (int i = group.rank(); i < side; i += group.size()) {
    double* row = x.matrix + lower(i, 0);
    for (int j = 0; j < i; ++j) row[j] *= det;
    row[i] = (row[i] + 1) * det;
  }
  group.sync();
  return -det;
}

// Computes ‖e‖, and, where the matrix is over the particles, G from the Gram matrix of e.
template <class V, class Group>
MULTILORA_HD void normalise(const Group& group, const Example<V>& x, int particles, bool gram) {
  for (int i = group.rank(); i < particles; i += group.size()) {
    V squares = x.norm[i];
    x.norm[i] = sqrt(squares);
    if (gram) {
      x.column[i] = V(1) / x.norm[i];
      // This is 1, or NaN where e is zero and has no direction.
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

// The gradient of −weight·log p_y. Off the target the softmax is f̃ · ‖e‖/(Σe + e_y); on the target
// p_y − 1 = −Σe/(Σe + e_y). If e_y overflows, p_y is 1 and the rest of the softmax is 0.
template <class V>
struct LossGradient {
  V offset;  // the factor of f̃ off the target
  V on_target;
};

template <class V>
MULTILORA_HD LossGradient<V> loss_gradient(V weight, V top, V norm, V rest, V own) {
  V share = weight / (rest + exp(own - top));
  return {share * norm, -(share * rest)};
}

// x_i = Σ_j core_ij f_j + offset_i, the factor of f̃_i, for `rows` particles i and some classes.
// `core` points to the first of these particles' rows, which are `next` apart; `f` to the first
// particle's classes, with the particles `stride` apart.
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
