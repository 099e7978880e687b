// C (+)= A B with B and C as rows of vectors; included once for each instruction set, inside its namespace, with `S`
// its struct.

// Units are 32 bits: a float, or two bfloat16 that are neighbours along the summed dimension.
struct Floats {
  static constexpr int kPer = 1;
  SHAREDLLM_SIMD S::F fma(S::F a, S::F b, S::F c) { return S::fma(a, b, c); }
};

struct Pairs {
  static constexpr int kPer = 2;
  template <class V = S>
  SHAREDLLM_SIMD typename V::F fma(typename V::F a, typename V::F b, typename V::F c) {
    return V::dot(a, b, c);
  }
};

// Bfloat16 pairs (a[i], b[i]), rounded; the row of `a` alone; and 16 pairs of two rows in memory, the second absent or
// not.
template <class V = S>
SHAREDLLM_SIMD typename V::F pair(typename V::F a, typename V::F b) {
  return V::pair(V::narrow(a), V::narrow(b));
}

template <class V = S>
SHAREDLLM_SIMD void save_narrow(float* to, typename V::F a) {
  V::store_narrow(to, V::narrow(a));
}

template <class V = S>
SHAREDLLM_SIMD void interleave(const bf16* a, const bf16* b, bool alone, float* to) {
  const auto low = V::load_narrow(a);
  V::save(to, V::pair(low, alone ? decltype(low){} : V::load_narrow(b)));
}

enum class Start { kZero, kAdd, kScale };  // what the sum starts from: 0, C, or C times a factor for each column

struct Product {
  int64_t depth;          // units along the summed dimension
  const float* a;         // one unit at a time, to all lanes
  int64_t a_row, a_step;  // units between rows of A, between steps of the sum
  const float* b;         // [depth][columns]
  int64_t b_step;
  float* c;  // [rows][columns]
  int64_t c_row;
  const float* factor = nullptr;
};

template <class E, Start start, int R, int V>
inline void product_tile(const Product& p, const float* a, const float* b, float* c, const float* factor) {
  S::F sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if constexpr (start == Start::kZero) {
        sum[r][v] = S::zero();
      } else {
        sum[r][v] = S::load(c + r * p.c_row + v * S::kLanes);
        if constexpr (start == Start::kScale) sum[r][v] = S::mul(sum[r][v], S::load(factor + v * S::kLanes));
      }
    }
  }
  const int64_t a_row = p.a_row;
  for (int64_t i = 0; i < p.depth; ++i) {
    S::F column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = S::load(b + v * S::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const S::F unit = S::set1(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = E::fma(unit, column[v], sum[r][v]);
    }
    a += p.a_step;
    b += p.b_step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) S::save(c + r * p.c_row + v * S::kLanes, sum[r][v]);
  }
}

// All rows of V vectors' worth of columns. Fewer vectors leave registers for more rows, which hide the sum's latency.
template <class E, Start start, int V>
inline void product_columns(const Product& p, int64_t rows, int64_t column) {
  constexpr int kRows = S::kRows * (V * 2 <= S::kVectors ? 2 : 1);
  const float *a = p.a, *b = p.b + column, *factor = p.factor + (start == Start::kScale ? column : 0);
  float* c = p.c + column;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    product_tile<E, start, kRows, V>(p, a + r * p.a_row, b, c + r * p.c_row, factor);
  for (; r + 4 <= rows; r += 4) product_tile<E, start, 4, V>(p, a + r * p.a_row, b, c + r * p.c_row, factor);
  for (; r + 2 <= rows; r += 2) product_tile<E, start, 2, V>(p, a + r * p.a_row, b, c + r * p.c_row, factor);
  for (; r < rows; ++r) product_tile<E, start, 1, V>(p, a + r * p.a_row, b, c + r * p.c_row, factor);
}

// `vectors` vectors of columns; C, B and factor must be readable that far.
template <class E, Start start>
inline void product(const Product& p, int64_t rows, int64_t vectors) {
  int64_t v = 0;
  for (; v + S::kVectors <= vectors; v += S::kVectors) product_columns<E, start, S::kVectors>(p, rows, v * S::kLanes);
  if constexpr (S::kVectors == 4) {
    if (vectors - v == 3) return product_columns<E, start, 3>(p, rows, v * S::kLanes);
    if (vectors - v == 2) return product_columns<E, start, 2>(p, rows, v * S::kLanes);
  }
  if (vectors - v == 1) product_columns<E, start, 1>(p, rows, v * S::kLanes);
}
