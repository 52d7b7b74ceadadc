// Products of a tile of rows with weights that stand still, as kernels call them. What runs is one library for each
// dtype (products.cpp), built once for all kernels.

template <class T> struct Products;

// A weight (k, n): where it is, and its packed copy (null where it is used as it is).
template <class T> struct Weight {
  const Products<T>* by;
  const T* w;
  long down, across, k, n;
  T* packed;

  void prepare(bool pack_it, long threads, Parallel parallel) { by->prepare(*this, pack_it, threads, parallel); }
};

template <class T> struct Products {
  void (*prepare)(Weight<T>& weight, bool pack_it, long threads, Parallel parallel);
  void (*multiply)(const T* a, long a_stride, long rows, const Weight<T>& weight, const T* bias, T* out, long out_stride, const Member& team);
};

// out[r, :n] = a[r, :k] @ weight for all rows of a tile; a team shares the columns.
template <class T>
INLINE void multiply(const T* a, long a_stride, long rows, const Weight<T>& weight, T* out, long out_stride, const Member& team) {
  weight.by->multiply(a, a_stride, rows, weight, (const T*)0, out, out_stride, team);
}

// The same for each of `count` matrices of `rows` rows, `apart` numbers from one to the next; as one product where all
// rows lie one after the other, so that the weight is read once.
template <class T>
INLINE void multiply_each(const T* a, long apart, long a_stride, long rows, long count, const Weight<T>& weight, T* out, long out_apart, long out_stride, const Member& team) {
  if (apart == rows * a_stride && out_apart == rows * out_stride) return multiply(a, a_stride, rows * count, weight, out, out_stride, team);
  for (long i = 0; i < count; ++i) multiply(a + i * apart, a_stride, rows, weight, out + i * out_apart, out_stride, team);
}
