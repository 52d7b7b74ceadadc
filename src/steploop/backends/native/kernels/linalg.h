// Linear algebra of one small matrix (n, n). Where it is written, it stands row by row. What is read has strides: `down`
// from row to row and `across` from column to column; `columns` is how many it has.

template <class T> INLINE T magnitude(T x) { return x < 0 ? -x : x; }
INLINE float root_of(float x) { return sqrtf(x); }
INLINE double root_of(double x) { return sqrt(x); }

template <class T> INLINE void copy_matrix(T* out, const T* a, long down, long across, long rows, long columns) {
  for (long i = 0; i < rows; ++i)
    for (long j = 0; j < columns; ++j) out[i * columns + j] = a[i * down + j * across];
}

template <class T> INLINE void swap_rows(T* x, long i, long j, long columns) {
  for (long c = 0; c < columns; ++c) {
    const T old = x[i * columns + c];
    x[i * columns + c] = x[j * columns + c];
    x[j * columns + c] = old;
  }
}

// x = a^-1 x for a triangle of a. x has rows of `columns` numbers.
template <long n, bool upper, bool unit, class T>
INLINE void divide_by_triangle(T* x, const T* a, long down, long across, long columns) {
  for (long done = 0; done < n; ++done) {
    const long i = upper ? n - 1 - done : done;
    for (long k = upper ? i + 1 : 0; k < (upper ? n : i); ++k) {
      const T factor = a[i * down + k * across];
      for (long c = 0; c < columns; ++c) x[i * columns + c] -= factor * x[k * columns + c];
    }
    if (!unit)
      for (long c = 0; c < columns; ++c) x[i * columns + c] /= a[i * down + i * across];
  }
}

// out: L below the diagonal and U on and above it (n * n), the row that each row was swapped with, from 1 (n), and the
// number of the first pivot that is 0, or 0. As LAPACK's getrf, with the largest of a column as pivot.
template <long n, class T> static void lu_factor(T* out, const T* a, long down, long across, long) {
  T* pivots = out + n * n;
  T zero_pivot = 0;
  copy_matrix(out, a, down, across, n, n);
  for (long k = 0; k < n; ++k) {
    long best = k;
    for (long i = k + 1; i < n; ++i)
      if (magnitude(out[i * n + k]) > magnitude(out[best * n + k])) best = i;
    pivots[k] = (T)(best + 1);
    if (best != k) swap_rows(out, k, best, n);
    const T pivot = out[k * n + k];
    if (pivot == 0) {
      if (zero_pivot == 0) zero_pivot = (T)(k + 1);
      continue;
    }
    for (long i = k + 1; i < n; ++i) {
      const T factor = out[i * n + k] /= pivot;
      for (long j = k + 1; j < n; ++j) out[i * n + j] -= factor * out[k * n + j];
    }
  }
  pivots[n] = zero_pivot;
}

// out = a^-1 b, or a^-T b (`adjoint`), of lu_factor's results for a.
template <long n, bool adjoint, class T, class P>
static void lu_solved(T* out, const T* lu, long down, long across, long, const P* pivots, long next_pivot, long, long,
                      const T* b, long b_down, long b_across, long columns) {
  copy_matrix(out, b, b_down, b_across, n, columns);
  if (adjoint) {
    divide_by_triangle<n, false, false>(out, lu, across, down, columns);
    divide_by_triangle<n, true, true>(out, lu, across, down, columns);
  }
  for (long done = 0; done < n; ++done) {
    const long i = adjoint ? n - 1 - done : done;
    const long other = (long)pivots[i * next_pivot] - 1;
    if (other != i) swap_rows(out, i, other, columns);
  }
  if (!adjoint) {
    divide_by_triangle<n, false, true>(out, lu, down, across, columns);
    divide_by_triangle<n, true, false>(out, lu, down, across, columns);
  }
}

// out = a^-1 b for a triangle of a; `unit`: with ones on the diagonal, which is not read.
template <long n, bool upper, bool unit, class T>
static void triangle_solved(T* out, const T* a, long down, long across, long, const T* b, long b_down, long b_across,
                            long columns) {
  copy_matrix(out, b, b_down, b_across, n, columns);
  divide_by_triangle<n, upper, unit>(out, a, down, across, columns);
}

// out: the lower triangle L with L L^T = a, of which the lower triangle is read (n * n), and the number of the first
// column where a is not positive definite, or 0. From there on L is nan.
template <long n, class T> static void cholesky_factor(T* out, const T* a, long down, long across, long) {
  T failed = 0;
  for (long j = 0; j < n; ++j) {
    for (long i = 0; i < j; ++i) out[i * n + j] = 0;
    T square = a[j * (down + across)];
    for (long k = 0; k < j; ++k) square -= out[j * n + k] * out[j * n + k];
    if (!(square > 0) && failed == 0) failed = (T)(j + 1);
    const T root = failed == 0 ? root_of(square) : (T)NAN;
    out[j * n + j] = root;
    for (long i = j + 1; i < n; ++i) {
      T value = a[i * down + j * across];
      for (long k = 0; k < j; ++k) value -= out[i * n + k] * out[j * n + k];
      out[i * n + j] = value / root;
    }
  }
  out[n * n] = failed;
}
