// Kernel of the node vectors; included once for each instruction set, inside its namespace, with `S` its struct.

inline int64_t lanes_down(int64_t n) { return n / S::kLanes * S::kLanes; }

template <class T>
inline void rotate_row(const T* from, const float* cos, const float* sin, int64_t half, int64_t size, float* to) {
  const int64_t whole = lanes_down(half);
  for (int64_t i = 0; i < whole; i += S::kLanes) {
    const S::F low = S::load(from + i), high = S::load(from + half + i), c = S::load(cos + i), s = S::load(sin + i);
    S::save(to + i, S::sub(S::mul(low, c), S::mul(high, s)));
    S::save(to + half + i, S::fma(low, s, S::mul(high, c)));
  }
  for (int64_t i = whole; i < half; ++i) {
    const float low = to_float(from[i]), high = to_float(from[half + i]);
    to[i] = low * cos[i] - high * sin[i];
    to[half + i] = high * cos[i] + low * sin[i];
  }
  int64_t i = 2 * half;
  for (; i + S::kLanes <= size; i += S::kLanes) S::save(to + i, S::load(from + i));
  for (; i < size; ++i) to[i] = to_float(from[i]);
}

inline float dot(const float* a, const float* b, int64_t size) {
  S::F even = S::zero(), odd = S::zero();
  int64_t i = 0;
  for (; i + 2 * S::kLanes <= size; i += 2 * S::kLanes) {
    even = S::fma(S::load(a + i), S::load(b + i), even);
    odd = S::fma(S::load(a + i + S::kLanes), S::load(b + i + S::kLanes), odd);
  }
  for (; i + S::kLanes <= size; i += S::kLanes) even = S::fma(S::load(a + i), S::load(b + i), even);
  float sum = S::sum(S::add(even, odd));
  for (; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// sums[g] += weights[g][t] * v for the G queries of a group, element block by element block.
template <class T>
inline void add_weighted(const float* weights, int64_t weights_row, const T* v, int64_t v_row, int64_t tokens,
                         int64_t groups, int64_t size, float* sums) {
  constexpr int64_t kTogether = 4;  // queries that share a load of v
  const int64_t whole = lanes_down(size);
  for (int64_t g = 0; g < groups; g += kTogether) {
    const int64_t count = std::min(kTogether, groups - g);
    for (int64_t i = 0; i < whole; i += S::kLanes) {
      S::F sum[kTogether];
      for (int64_t j = 0; j < kTogether; ++j) sum[j] = j < count ? S::load(sums + (g + j) * size + i) : S::zero();
      for (int64_t t = 0; t < tokens; ++t) {
        const S::F x = S::load(v + t * v_row + i);
        // past the last query: the last one once more, discarded
        for (int64_t j = 0; j < kTogether; ++j) {
          sum[j] = S::fma(S::set1(weights[(g + std::min(j, count - 1)) * weights_row + t]), x, sum[j]);
        }
      }
      for (int64_t j = 0; j < count; ++j) S::save(sums + (g + j) * size + i, sum[j]);
    }
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = whole; i < size; ++i) {
        float sum = sums[(g + j) * size + i];
        for (int64_t t = 0; t < tokens; ++t) sum += weights[(g + j) * weights_row + t] * to_float(v[t * v_row + i]);
        sums[(g + j) * size + i] = sum;
      }
    }
  }
}

constexpr int64_t kTokens = 64;  // tokens between two updates of the running maximum

// Queries of one group, rotated [groups][D]; running maximum, sum and weighted values: an online softmax over the node.
template <class T>
inline void attend(const Problem& p, int64_t node, int64_t head, float* scratch) {
  const int64_t start = p.spans[2 * node], length = p.spans[2 * node + 1], groups = p.groups, size = p.size;
  float *query = scratch, *sums = query + groups * size, *scores = sums + groups * size,
        *key = scores + groups * kTokens;
  float *top = key + size, *total = top + groups;
  const T* q = static_cast<const T*>(p.q) + node * p.q_row + head * groups * p.q_head;
  // scores are scaled in the exponent, to base 2, after the maximum is subtracted; a negative scale negates the queries
  const float exponent = std::abs(p.scale) * 1.4426950408889634f;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t last = (length - 1) * p.half;
    rotate_row(q + g * p.q_head, p.cos + last, p.sin + last, p.half, size, query + g * size);
    if (p.scale < 0) {
      for (int64_t i = 0; i < size; ++i) query[g * size + i] = -query[g * size + i];
    }
    top[g] = -INFINITY;
    total[g] = 0.0f;
  }
  std::memset(sums, 0, sizeof(float) * groups * size);
  for (int64_t first = 0; first < length; first += kTokens) {
    const int64_t count = std::min(kTokens, length - first);
    const T* k = static_cast<const T*>(p.k) + (start + first) * p.k_row + head * p.k_head;
    const T* v = static_cast<const T*>(p.v) + (start + first) * p.v_row + head * p.v_head;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t place = (first + t) * p.half;
      rotate_row(k + t * p.k_row, p.cos + place, p.sin + place, p.half, size, key);
      for (int64_t g = 0; g < groups; ++g) scores[g * kTokens + t] = dot(query + g * size, key, size);
    }
    for (int64_t g = 0; g < groups; ++g) {
      float* row = scores + g * kTokens;
      float high = -FLT_MAX;
      for (int64_t t = 0; t < count; ++t) high = std::max(high, row[t]);
      high = std::max(top[g], std::max(high * exponent, -FLT_MAX));
      for (int64_t t = count; t < kTokens; ++t) row[t] = 0.0f;
      S::F sum = S::zero();
      for (int64_t t = 0; t < kTokens; t += S::kLanes) {
        const S::F weight = S::exp2(S::fma(S::load(row + t), S::set1(exponent), S::set1(-high)));
        S::save(row + t, weight);
      }
      for (int64_t t = count; t < kTokens; ++t) row[t] = 0.0f;
      for (int64_t t = 0; t < kTokens; t += S::kLanes) sum = S::add(sum, S::load(row + t));
      const float factor = std::exp2(top[g] - high);
      total[g] = total[g] * factor + S::sum(sum);
      top[g] = high;
      if (factor != 1.0f) {
        for (int64_t i = 0; i < size; ++i) sums[g * size + i] *= factor;
      }
    }
    add_weighted(scores, kTokens, v, p.v_row, count, groups, size, sums);
  }
  T* out = static_cast<T*>(p.out) + (node * p.kv_heads + head) * groups * size;
  for (int64_t g = 0; g < groups; ++g) {
    const float inverse = 1.0f / total[g];
    for (int64_t i = 0; i < size; ++i) store(out + g * size + i, sums[g * size + i] * inverse);
  }
}

template <class T>
void run_nodes(const Problem& p, int64_t begin, int64_t end) {
  const size_t scratch = 2 * p.groups * p.size + p.groups * kTokens + p.size + 2 * p.groups;
  const std::unique_ptr<float[]> memory(new float[scratch]);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t node = i / p.kv_heads, head = i % p.kv_heads;
    if (p.spans[2 * node + 1] == 0) {
      T* out = static_cast<T*>(p.out) + i * p.groups * p.size;
      std::memset(out, 0, sizeof(T) * p.groups * p.size);
    } else {
      attend<T>(p, node, head, memory.get());
    }
  }
}
