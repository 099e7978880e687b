// Matmul of a few rows: every weight is read once, as it is in memory, for all rows. Included once for each instruction
// set, inside its namespace, with `S` its struct.

// Rows of x that a tile takes at once; times its rows of weights they are the sums that fit the registers.
constexpr int kTogether = S::kLanes == 16 ? 8 : 4;

// Elements that a lane's sum runs over before it is put aside: long float32 sums lose digits.
constexpr int64_t kDepth = 64 * S::kLanes;

template <class T>
inline float rounded(float x) {
  T narrow;
  store(&narrow, x);
  return to_float(narrow);
}

// x as floats, normed: rounded to T before and after the norm's weight, as the family's norm does.
template <class T>
inline void load_rows(const Linear& p, float* to) {
  const T* const norm = static_cast<const T*>(p.norm);
  for (int64_t row = 0; row < p.rows; ++row, to += p.size) {
    const T* const from = static_cast<const T*>(p.x) + row * p.size;
    for (int64_t i = 0; i < p.size; ++i) to[i] = to_float(from[i]);
    if (!norm) continue;
    S::F squares = S::zero();
    int64_t i = 0;
    for (; i + S::kLanes <= p.size; i += S::kLanes) squares = S::fma(S::load(to + i), S::load(to + i), squares);
    float sum = S::sum(squares);
    for (; i < p.size; ++i) sum += to[i] * to[i];
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(p.size) + p.eps);
    for (i = 0; i < p.size; ++i) to[i] = rounded<T>(to_float(norm[i]) * rounded<T>(to[i] * factor));
  }
}

// to[r][n] = x[r] w[n] for R rows of x and N rows of weights.
template <class T, int R, int N>
inline void tile(const float* x, const T* w, int64_t size, float* to, int64_t to_row) {
  for (int64_t begin = 0; begin < size || begin == 0; begin += kDepth) {
    const int64_t end = std::min(begin + kDepth, size);
    S::F sum[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = S::zero();
    }
    int64_t i = begin;
    for (; i + S::kLanes <= end; i += S::kLanes) {
      S::F weight[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        weight[n] = S::load(w + n * size + i);
        // the next tile's row, which the hardware does not foresee where a row ends
        __builtin_prefetch(w + (N + n) * size + i);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const S::F unit = S::load(x + r * size + i);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[r][n] = S::fma(unit, weight[n], sum[r][n]);
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float total[R];
      if constexpr (R % 4 == 0) {
        for (int r = 0; r < R; r += 4) S::sum4(sum[r][n], sum[r + 1][n], sum[r + 2][n], sum[r + 3][n], total + r);
      } else {
        for (int r = 0; r < R; ++r) total[r] = S::sum(sum[r][n]);
      }
      for (int r = 0; r < R; ++r) {
        for (int64_t j = i; j < end; ++j) total[r] += x[r * size + j] * to_float(w[n * size + j]);
        to[r * to_row + n] = begin == 0 ? total[r] : to[r * to_row + n] + total[r];
      }
    }
  }
}

// `count` rows of weights against all rows of x, R at a time.
template <class T, int N>
inline void columns(const float* x, int64_t rows, const T* w, int64_t size, float* to, int64_t to_row) {
  const auto step = [&](auto kernel, int together) {
    kernel(x, w, size, to, to_row);
    x += together * size;
    to += together * to_row;
    rows -= together;
  };
  if constexpr (kTogether == 8) {
    while (rows >= 8) step(tile<T, 8, N>, 8);
  }
  while (rows >= 4) step(tile<T, 4, N>, 4);
  if (rows >= 2) step(tile<T, 2, N>, 2);
  if (rows == 1) step(tile<T, 1, N>, 1);
}

// to [rows][kTaskRows] = x w^T for `count` rows of weights of a matrix.
template <class W>
inline void product(const Linear& p, const float* x, const Matrix& matrix, int64_t first, int64_t count, float* to) {
  const W* const w = static_cast<const W*>(matrix.weight) + first * p.size;
  int64_t n = 0;
  if (p.rows == 1) {
    // one row has few sums otherwise, each of which waits for the last one
    for (; n + 8 <= count; n += 8) tile<W, 1, 8>(x, w + n * p.size, p.size, to + n, kTaskRows);
  }
  for (; n + 3 <= count; n += 3) columns<W, 3>(x, p.rows, w + n * p.size, p.size, to + n, kTaskRows);
  for (; n < count; ++n) columns<W, 1>(x, p.rows, w + n * p.size, p.size, to + n, kTaskRows);
  if (!matrix.scale) return;
  for (int64_t row = 0; row < p.rows; ++row) {
    for (n = 0; n < count; ++n) to[row * kTaskRows + n] *= matrix.scale[first + n];
  }
}

template <class T>
inline void add_bias(const void* bias, int64_t first, int64_t rows, int64_t count, float* to) {
  if (!bias) return;
  const T* const from = static_cast<const T*>(bias) + first;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < count; ++n) to[row * kTaskRows + n] += to_float(from[n]);
  }
}

// gate * sigmoid(gate), kTaskRows of them.
inline void silu(float* gate) {
  float power[kTaskRows];
  constexpr float kLargest = 126;  // 2^x beyond has no place in the polynomial
  for (int64_t n = 0; n < kTaskRows; ++n) {
    const float exponent = gate[n] * -1.4426950408889634f;
    power[n] = exponent > kLargest ? kLargest : exponent;
  }
  for (int64_t n = 0; n < kTaskRows; n += S::kLanes) S::save(power + n, S::exp2(S::load(power + n)));
  for (int64_t n = 0; n < kTaskRows; ++n) {
    const bool far = gate[n] * -1.4426950408889634f > kLargest;
    gate[n] /= 1 + (far ? std::exp(-gate[n]) : power[n]);
  }
}

// Rows [first, first + count) of a matrix, with its epilogue. Scratch: twice [rows][kTaskRows].
template <class T, class W>
inline void run_task(const Linear& p, const float* x, const Matrix& matrix, int64_t first, int64_t count,
                     float* scratch) {
  product<W>(p, x, matrix, first, count, scratch);
  add_bias<T>(matrix.bias, first, p.rows, count, scratch);
  float* const up = scratch + p.rows * kTaskRows;
  if (p.gated) {
    const Matrix& other = p.matrices[1];
    product<W>(p, x, other, first, count, up);
    add_bias<T>(other.bias, first, p.rows, count, up);
  }
  for (int64_t row = 0; row < p.rows; ++row) {
    float* const sums = scratch + row * kTaskRows;
    const int64_t place = row * p.columns + matrix.column + first;
    if (p.gated) {
      for (int64_t n = count; n < kTaskRows; ++n) sums[n] = 0;
      silu(sums);
      for (int64_t n = 0; n < count; ++n) sums[n] *= up[row * kTaskRows + n];
    }
    if (p.residual) {
      const T* const residual = static_cast<const T*>(p.residual) + place;
      for (int64_t n = 0; n < count; ++n) sums[n] += to_float(residual[n]);
    }
    T* const out = static_cast<T*>(p.out) + place;
    for (int64_t n = 0; n < count; ++n) store(out + n, sums[n]);
  }
}

template <class T, class W>
inline void worker(const Linear& p, const float* x, std::atomic<int64_t>& next) {
  std::vector<float> scratch(2 * p.rows * kTaskRows);
  const int64_t matrices = p.gated ? 1 : static_cast<int64_t>(p.matrices.size());
  int64_t task = next++, before = 0;
  for (int64_t i = 0; i < matrices; ++i) {
    const Matrix& matrix = p.matrices[i];
    const int64_t tasks = ceil_div(matrix.rows, kTaskRows);
    for (; task < before + tasks; task = next++) {
      const int64_t first = (task - before) * kTaskRows;
      run_task<T, W>(p, x, matrix, first, std::min(kTaskRows, matrix.rows - first), scratch.data());
    }
    before += tasks;
  }
}

// T: type of x and of the result; W: of the weights.
template <class T, class W>
void run(const Linear& p) {
  std::vector<float> x(p.rows * p.size);
  load_rows<T>(p, x.data());
  int64_t tasks = 0;
  const size_t matrices = p.gated ? 1 : p.matrices.size();
  for (size_t i = 0; i < matrices; ++i) tasks += ceil_div(p.matrices[i].rows, kTaskRows);
  run_tasks(tasks, [&](std::atomic<int64_t>& next) { worker<T, W>(p, x.data(), next); });
}
