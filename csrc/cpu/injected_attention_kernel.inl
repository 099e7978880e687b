// Kernels of injected attention (online softmax, GQA); included once for each instruction set, inside its namespace,
// with `S` its struct.
// Everything is transposed: a vector holds the same element for 16 (8, 4) queries, so that the softmax needs no sum
// across lanes, keys and values are read one unit at a time as they are in memory, and all matmuls are one kernel
// (product.inl).

template <class T>
constexpr bool kUsePairs = S::kPairs && sizeof(T) == sizeof(bf16);

template <class T>
struct Traits {
  using E = std::conditional_t<kUsePairs<T>, Pairs, Floats>;
  static constexpr int64_t kPer = E::kPer;
};

constexpr int64_t kPanel = S::kVectors * S::kLanes;  // queries in a panel
constexpr float kLog2E = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;

inline int64_t lanes_up(int64_t n) { return ceil_div(n, S::kLanes) * S::kLanes; }

// Element i of unit u sits in the low half for even i.
template <class T>
inline void put(float* units, int64_t unit, int64_t part, float x) {
  if constexpr (kUsePairs<T>) {
    reinterpret_cast<bf16*>(units)[2 * unit + part] = to_bf16(x);
  } else {
    units[unit] = x;
  }
}

// Scores are scaled in the exponent, to base 2; a negative scale negates the queries, so that the maximum stays one.
inline float exponent_scale(const Problem& p) { return std::abs(p.scale) * kLog2E; }

// One query, rotated to its position (direction -1 rotates back), times a factor.
template <class T>
inline void rotate(const Problem& p, int64_t position, const T* from, float factor, float* to, float direction = 1) {
  const float* cos = p.cos + position * p.half;
  const float* sin = p.sin + position * p.half;
  for (int64_t i = 0; i < p.half; ++i) {
    const float low = to_float(from[i]), high = to_float(from[i + p.half]), turn = direction * sin[i];
    to[i] = (low * cos[i] - high * turn) * factor;
    to[i + p.half] = (high * cos[i] + low * turn) * factor;
  }
  for (int64_t i = 2 * p.half; i < p.size; ++i) to[i] = to_float(from[i]) * factor;
}

template <class T>
inline const T* at(const View& view, int64_t row, int64_t head) {
  return static_cast<const T*>(view.data) + row * view.row + head * view.head;
}

// Column `column` of a panel [units of D][kPanel].
template <class T>
inline void put_column(const float* x, int64_t size, float* panel, int64_t column) {
  constexpr int64_t kPer = Traits<T>::kPer;
  for (int64_t i = 0; i < size; ++i) put<T>(panel, i / kPer * kPanel + column, i % kPer, x[i]);
  if (size % kPer) put<T>(panel, size / kPer * kPanel + column, 1, 0.0f);
}

// Slots as they are in memory, or copied: units along D (keys times queries), and along the slots (values times
// weights).
struct Slots {
  const float* along_size;
  int64_t along_size_row;
  const float* along_slots;  // [units of slots][D]
  int64_t along_slots_row;
};

// Prefetches a run of slots: a head's rows are short and far apart, which the hardware does not foresee.
template <class T>
inline void prefetch_slots(const View& view, int64_t first, int64_t count, int64_t head, int64_t size) {
  for (int64_t s = 0; s < count; ++s) {
    const T* row = at<T>(view, first + s, head);
    for (int64_t i = 0; i < size; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
  }
}

// A run of slots of one head. Copied where the layout or the type needs it, or where `reuse` repays packing them
// densely.
template <class T>
inline Slots load_slots(const View& view, int64_t first, int64_t count, int64_t head, int64_t size, bool need_size,
                        bool need_slots, bool reuse, float* size_copy, float* slots_copy) {
  const T* from = at<T>(view, first, head);
  if constexpr (kUsePairs<T>) {
    Slots slots{reinterpret_cast<const float*>(from), view.row / 2, slots_copy, size};
    // units are floats: a pair may begin at an odd element
    const bool halfway = reinterpret_cast<uintptr_t>(from) % sizeof(float) != 0;
    if (need_size && (reuse || halfway || size % 2 || view.row % 2)) {
      const int64_t units = ceil_div(size, 2);
      for (int64_t s = 0; s < count; ++s) {
        float* to = size_copy + s * units;
        if (size % 2) to[units - 1] = 0.0f;
        std::memcpy(to, from + s * view.row, size * sizeof(T));
      }
      slots.along_size = size_copy;
      slots.along_size_row = units;
    }
    if (need_slots) {
      for (int64_t s = 0; s < count; s += 2) {
        const bool odd = s + 1 == count;
        const T *low = from + s * view.row, *high = odd ? low : low + view.row;
        float* to = slots_copy + s / 2 * size;
        int64_t i = 0;
        for (; i + S::kLanes <= size; i += S::kLanes) interleave(low + i, high + i, odd, to + i);
        for (; i < size; ++i) {
          const uint32_t bits = low[i] | (odd ? 0u : static_cast<uint32_t>(high[i]) << 16);
          std::memcpy(to + i, &bits, sizeof bits);
        }
      }
    }
    return slots;
  } else {
    if (std::is_same_v<T, float> && !reuse) {
      const float* units = reinterpret_cast<const float*>(from);
      return {units, view.row, units, view.row};
    }
    for (int64_t s = 0; s < count; ++s) {
      const T* row = from + s * view.row;
      float* to = size_copy + s * size;
      int64_t i = 0;
      for (; i + S::kLanes <= size; i += S::kLanes) S::save(to + i, S::load(row + i));
      for (; i < size; ++i) to[i] = to_float(row[i]);
    }
    return {size_copy, size, size_copy, size};
  }
}

// State of the forward pass over one query block: all panels, of one part of its slots.
template <class T>
class ForwardBlock {
 public:
  static constexpr int64_t kPer = Traits<T>::kPer;

  ForwardBlock(const Forward& p, int64_t max_queries)
      : p_(p),
        units_(ceil_div(p.size, kPer)),
        panels_(ceil_div(max_queries, kPanel)),
        query_(panels_ * units_ * kPanel),
        scores_((kSlots + 1) * kPanel),
        keys_(kSlots * lanes_up(p.size)),
        values_(kSlots * lanes_up(p.size)),
        alpha_(kPanel),
        vector_(p.size) {}

  // Unnormalised output [panels][D][kPanel], maximum and sum [panels][kPanel] of one part of the slots.
  void run(const QueryBlock& block, int64_t low, int64_t high, float* out, float* top, float* sum) {
    load_queries(block);
    const int64_t panels = ceil_div(block.count, kPanel);
    for (int64_t i = 0; i < panels * kPanel; ++i) {
      top[i] = -INFINITY;
      sum[i] = 0.0f;
    }
    // below three panels the copy costs more than scattered reads
    const bool reuse = panels > 2;
    for (int64_t first = low; first < high; first += kSlots) {
      const int64_t count = std::min(kSlots, high - first), ahead = std::min(kSlots, high - first - count);
      const Slots k = load_slots<T>(p_.k, first, count, block.head, p_.size, true, false, reuse, keys_.get(), nullptr);
      const Slots v =
          load_slots<T>(p_.v, first, count, block.head, p_.size, false, true, reuse, values_.get(), values_.get());
      if (!reuse) {
        prefetch_slots<T>(p_.k, first + count, ahead, block.head, p_.size);
        prefetch_slots<T>(p_.v, first + count, ahead, block.head, p_.size);
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t columns = std::min(kPanel, block.count - panel * kPanel);
        step(k, v, count, panel, ceil_div(columns, S::kLanes), first == low, out + panel * p_.size * kPanel,
             top + panel * kPanel, sum + panel * kPanel);
      }
    }
  }

 private:
  void load_queries(const QueryBlock& block) {
    float* query = query_.get();
    std::memset(query, 0, sizeof(float) * ceil_div(block.count, kPanel) * units_ * kPanel);
    for (int64_t i = 0; i < block.count; ++i) {
      const auto [token, head, position] = stacked_query(p_, block.row, block.head, block.begin + i);
      rotate(p_, position, at<T>(p_.q, token, head), p_.scale < 0 ? -1.0f : 1.0f, vector_.get());
      put_column<T>(vector_.get(), p_.size, query + i / kPanel * units_ * kPanel, i % kPanel);
    }
  }

  void step(const Slots& k, const Slots& v, int64_t count, int64_t panel, int64_t vectors, bool first, float* out,
            float* top, float* sum) {
    using E = typename Traits<T>::E;
    float *scores = scores_.get(), *alpha = alpha_.get();
    const S::F scale = S::set1(exponent_scale(p_));
    product<E, Start::kZero>(
        {units_, k.along_size, k.along_size_row, 1, query_.get() + panel * units_ * kPanel, kPanel, scores, kPanel},
        count, vectors);
    for (int64_t c = 0; c < vectors * S::kLanes; c += S::kLanes) {
      S::F high = S::load(scores + c), other = high;
      int64_t s = 0;
      for (; s + 2 <= count; s += 2) {
        high = S::max(high, S::load(scores + s * kPanel + c));
        other = S::max(other, S::load(scores + (s + 1) * kPanel + c));
      }
      if (s < count) high = S::max(high, S::load(scores + s * kPanel + c));
      // the lowest number, not -inf, so that -inf scores weigh 0 and not NaN
      high = S::max(S::set1(-FLT_MAX), S::mul(scale, S::max(other, high)));
      high = S::max(high, S::load(top + c));
      const S::F factor = S::exp2(S::sub(S::load(top + c), high));
      S::save(alpha + c, factor);
      S::save(top + c, high);
      const S::F total = weigh<T>(scores + c, count, scale, S::sub(S::zero(), high));
      S::save(sum + c, S::fma(S::load(sum + c), factor, total));
    }
    Product weighted{ceil_div(count, kPer), v.along_slots, 1, v.along_slots_row, scores, kPanel, out, kPanel};
    if (first) return product<E, Start::kZero>(weighted, p_.size, vectors);
    weighted.factor = alpha;
    product<E, Start::kScale>(weighted, p_.size, vectors);
  }

  // Turns scores of a vector of queries into weights, in place (pairs: of two neighbouring slots); gives their sum.
  template <class U>
  static inline S::F weigh(float* scores, int64_t count, S::F scale, S::F minus_high) {
    S::F even = S::zero(), odd = S::zero();
    int64_t s = 0;
    for (; s + 2 <= count; s += 2) {
      const S::F a = S::exp2(S::fma(S::load(scores + s * kPanel), scale, minus_high));
      const S::F b = S::exp2(S::fma(S::load(scores + (s + 1) * kPanel), scale, minus_high));
      even = S::add(even, a);
      odd = S::add(odd, b);
      if constexpr (kUsePairs<U>) {
        S::save(scores + s / 2 * kPanel, pair(a, b));
      } else {
        S::save(scores + s * kPanel, a);
        S::save(scores + (s + 1) * kPanel, b);
      }
    }
    if (s < count) {
      const S::F a = S::exp2(S::fma(S::load(scores + s * kPanel), scale, minus_high));
      even = S::add(even, a);
      if constexpr (kUsePairs<U>) {
        S::save(scores + s / 2 * kPanel, pair(a, S::zero()));
      } else {
        S::save(scores + s * kPanel, a);
      }
    }
    return S::add(even, odd);
  }

  const Forward& p_;
  const int64_t units_, panels_;
  Floats64 query_, scores_, keys_, values_, alpha_, vector_;
};

// Merge the parts of a query block and write the result. `panels`: out is [panels][D][kPanel], else [queries][D].
template <class T>
inline void finish(const Forward& p, const QueryBlock& block, bool panels, int64_t parts, const float* out,
                   int64_t out_part, const float* top, const float* sum, int64_t top_part) {
  const int64_t step = panels ? kPanel : 1;
  for (int64_t i = 0; i < block.count; ++i) {
    const StackedQuery query = stacked_query(p, block.row, block.head, block.begin + i);
    const int64_t place = query.token * p.q_heads + query.head;
    float high = -FLT_MAX;
    for (int64_t part = 0; part < parts; ++part) high = std::max(high, top[part * top_part + i]);
    double total = 0;
    double weight[kMaxParts];
    for (int64_t part = 0; part < parts; ++part) {
      weight[part] = std::exp2(static_cast<double>(top[part * top_part + i]) - high);
      total += weight[part] * sum[part * top_part + i];
    }
    p.lse[place] = static_cast<float>(high * kLn2 + std::log(total));
    T* to = static_cast<T*>(p.out) + place * p.size;
    const float* column = out + (panels ? i / kPanel * p.size * kPanel + i % kPanel : i * p.size);
    for (int64_t part = 0; part < parts; ++part) weight[part] /= total;
    for (int64_t d = 0; d < p.size; ++d) {
      double x = 0;
      for (int64_t part = 0; part < parts; ++part) x += weight[part] * column[part * out_part + d * step];
      store(to + d, static_cast<float>(x));
    }
  }
}

struct Task {
  int64_t block, low, high;
  float *out, *top, *sum;  // null: the worker's own
};

template <class T>
inline void forward_worker(const Forward& p, const std::vector<QueryBlock>& blocks, const std::vector<Task>& tasks,
                           int64_t max_queries, std::atomic<int64_t>& next) {
  const int64_t columns = ceil_div(max_queries, kPanel) * kPanel;
  ForwardBlock<T> state(p, max_queries);
  Floats64 out(columns * p.size), top(columns), sum(columns);
  for (int64_t i; (i = next++) < static_cast<int64_t>(tasks.size());) {
    const Task& task = tasks[i];
    const QueryBlock& block = blocks[task.block];
    if (task.out) {
      state.run(block, task.low, task.high, task.out, task.top, task.sum);
    } else {
      state.run(block, task.low, task.high, out.get(), top.get(), sum.get());
      finish<T>(p, block, true, 1, out.get(), 0, top.get(), sum.get(), 0);
    }
  }
}

template <class T>
inline void finish_empty(const Forward& p, const QueryBlock& block) {
  for (int64_t i = block.begin; i < block.begin + block.count; ++i) {
    const StackedQuery query = stacked_query(p, block.row, block.head, i);
    const int64_t place = query.token * p.q_heads + query.head;
    p.lse[place] = -INFINITY;
    std::memset(static_cast<T*>(p.out) + place * p.size, 0, p.size * sizeof(T));
  }
}

// A row with few queries reads much memory for little arithmetic: all heads of a run of slots together, as they are in
// memory, and vectors along D, as few queries would leave most lanes of a panel idle.
constexpr int64_t kFewQueries = 8;  // for each key/value head
constexpr int64_t kFewSlots = 32;
constexpr int64_t kMinFewPart = 256;
constexpr int64_t kSerialMerge = 1 << 17;  // floats
constexpr int kTogether =
    S::kLanes == 16 ? 4 : 2;  // queries that share a load, times 4 slots: sums that fit the registers

inline bool few_queries(const Problem& p, int64_t stacked) { return stacked <= kFewQueries && p.size % S::kLanes == 0; }

// scores[r][s] = q[r] k[s]
template <class T, int R>
inline void few_scores(const float* q, int64_t size, const T* k, int64_t k_row, int64_t count, float* scores) {
  int64_t s = 0;
  for (; s + 4 <= count; s += 4) {
    const T* row = k + s * k_row;
    S::F sum[R][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = S::zero();
    for (int64_t d = 0; d < size; d += S::kLanes) {
      const S::F a = S::load(row + d), b = S::load(row + k_row + d);
      const S::F c = S::load(row + 2 * k_row + d), e = S::load(row + 3 * k_row + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const S::F x = S::load(q + r * size + d);
        sum[r][0] = S::fma(x, a, sum[r][0]);
        sum[r][1] = S::fma(x, b, sum[r][1]);
        sum[r][2] = S::fma(x, c, sum[r][2]);
        sum[r][3] = S::fma(x, e, sum[r][3]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) S::sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kFewSlots + s);
  }
  for (; s < count; ++s) {
    for (int r = 0; r < R; ++r) {
      S::F sum = S::zero();
      for (int64_t d = 0; d < size; d += S::kLanes)
        sum = S::fma(S::load(q + r * size + d), S::load(k + s * k_row + d), sum);
      scores[r * kFewSlots + s] = S::sum(sum);
    }
  }
}

// sums[r] += weights[r][s] v[s], V vectors of D
template <class T, int R, int V>
inline void few_values_part(const float* weights, const T* v, int64_t v_row, int64_t count, int64_t size, float* sums) {
  S::F sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) sum[r][i] = S::load(sums + r * size + i * S::kLanes);
  }
  for (int64_t s = 0; s < count; ++s) {
    S::F x[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) x[i] = S::load(v + s * v_row + i * S::kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const S::F weight = S::set1(weights[r * kFewSlots + s]);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sum[r][i] = S::fma(weight, x[i], sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) S::save(sums + r * size + i * S::kLanes, sum[r][i]);
  }
}

template <class T, int R>
inline void few_values(const float* weights, const T* v, int64_t v_row, int64_t count, int64_t size, float* sums) {
  int64_t d = 0;
  for (; d + 4 * S::kLanes <= size; d += 4 * S::kLanes)
    few_values_part<T, R, 4>(weights, v + d, v_row, count, size, sums + d);
  for (; d < size; d += S::kLanes) few_values_part<T, R, 1>(weights, v + d, v_row, count, size, sums + d);
}

// Turns scores [kFewSlots] of one query into weights; its running maximum, sum and output follow.
inline void few_weights(float* scores, int64_t count, float exponent, float& top, float& total, float* sums,
                        int64_t size) {
  for (int64_t s = count; s < kFewSlots; ++s) scores[s] = scores[0];
  S::F highest = S::load(scores);
  for (int64_t s = S::kLanes; s < kFewSlots; s += S::kLanes) highest = S::max(highest, S::load(scores + s));
  float lanes[S::kLanes];
  S::save(lanes, highest);
  float high = -FLT_MAX;
  for (float x : lanes) high = std::max(high, x);
  high = std::max(top, std::max(high * exponent, -FLT_MAX));
  for (int64_t s = 0; s < kFewSlots; s += S::kLanes) {
    S::save(scores + s, S::exp2(S::fma(S::load(scores + s), S::set1(exponent), S::set1(-high))));
  }
  for (int64_t s = count; s < kFewSlots; ++s) scores[s] = 0.0f;
  S::F sum = S::zero();
  for (int64_t s = 0; s < kFewSlots; s += S::kLanes) sum = S::add(sum, S::load(scores + s));
  if (high != top) {
    const float factor = std::exp2(top - high);
    total *= factor;
    for (int64_t d = 0; d < size; d += S::kLanes) S::save(sums + d, S::mul(S::load(sums + d), S::set1(factor)));
  }
  total += S::sum(sum);
  top = high;
}

struct FewTask {
  int64_t row, count, low, high;  // stacked queries of each head; slots
  float *out, *top, *sum;         // [Hkv][count][D], [Hkv][count], [Hkv][count]
};

template <class T, int R>
inline void few_step(const Forward& p, const float* query, const T* k, const T* v, int64_t count, float* scores,
                     float* out, float* top, float* sum) {
  few_scores<T, R>(query, p.size, k, p.k.row, count, scores);
  for (int r = 0; r < R; ++r) {
    few_weights(scores + r * kFewSlots, count, exponent_scale(p), top[r], sum[r], out + r * p.size, p.size);
  }
  few_values<T, R>(scores, v, p.v.row, count, p.size, out);
}

template <class T>
inline void few_worker(const Forward& p, const std::vector<FewTask>& tasks, std::atomic<int64_t>& next) {
  Floats64 queries(p.kv_heads * kFewQueries * p.size), scores(kTogether * kFewSlots);
  for (int64_t i; (i = next++) < static_cast<int64_t>(tasks.size());) {
    const FewTask& task = tasks[i];
    for (int64_t j = 0; j < p.kv_heads * task.count; ++j) {
      const auto [token, head, position] = stacked_query(p, task.row, j / task.count, j % task.count);
      rotate(p, position, at<T>(p.q, token, head), p.scale < 0 ? -1.0f : 1.0f, queries.get() + j * p.size);
      task.top[j] = -INFINITY;
      task.sum[j] = 0.0f;
    }
    std::memset(task.out, 0, sizeof(float) * p.kv_heads * task.count * p.size);
    for (int64_t first = task.low; first < task.high; first += kFewSlots) {
      const int64_t count = std::min(kFewSlots, task.high - first),
                    ahead = std::min(kFewSlots, task.high - first - count);
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        prefetch_slots<T>(p.k, first + count, ahead, head, p.size);
        prefetch_slots<T>(p.v, first + count, ahead, head, p.size);
        const T *k = at<T>(p.k, first, head), *v = at<T>(p.v, first, head);
        int64_t j = head * task.count;
        const int64_t end = j + task.count;
        const auto step = [&](auto kernel, int64_t queries_together) {
          kernel(p, queries.get() + j * p.size, k, v, count, scores.get(), task.out + j * p.size, task.top + j,
                 task.sum + j);
          j += queries_together;
        };
        while (j + kTogether <= end) step(few_step<T, kTogether>, kTogether);
        while (j + 2 <= end) step(few_step<T, 2>, 2);
        while (j < end) step(few_step<T, 1>, 1);
      }
    }
  }
}

// Rows with few queries and some slots.
template <class T>
inline void forward_few(const Forward& p, const std::vector<int64_t>& rows) {
  if (rows.empty()) return;
  const int64_t wanted = std::min(kMaxParts, ceil_div(kWantedTasks, static_cast<int64_t>(rows.size())));
  struct Merge {
    int64_t row, count, parts, first;
  };
  std::vector<FewTask> tasks;
  std::vector<Merge> merges;
  for (int64_t row : rows) {
    const int64_t low = p.slot_range[2 * row], high = p.slot_range[2 * row + 1], slots = high - low;
    const int64_t length =
        ceil_div(std::max(ceil_div(slots, wanted), std::min(kMinFewPart, slots)), kFewSlots) * kFewSlots;
    const int64_t count = (p.cu_q[row + 1] - p.cu_q[row]) * p.groups;
    merges.push_back({row, count, ceil_div(slots, length), static_cast<int64_t>(tasks.size())});
    for (int64_t begin = low; begin < high; begin += length) {
      tasks.push_back({row, count, begin, std::min(begin + length, high), nullptr, nullptr, nullptr});
    }
  }
  const int64_t heads = p.kv_heads * kFewQueries, total = static_cast<int64_t>(tasks.size());
  Floats64 out(total * heads * p.size), top(total * heads), sum(total * heads);
  for (int64_t i = 0; i < total; ++i) {
    tasks[i].out = out.get() + i * heads * p.size;
    tasks[i].top = top.get() + i * heads;
    tasks[i].sum = sum.get() + i * heads;
  }
  run_tasks(total, [&](std::atomic<int64_t>& next) { few_worker<T>(p, tasks, next); });
  const auto merge_all = [&](std::atomic<int64_t>& next) {
    for (int64_t i; (i = next++) < static_cast<int64_t>(merges.size()) * p.kv_heads;) {
      const Merge& merge = merges[i / p.kv_heads];
      const int64_t head = i % p.kv_heads;
      const FewTask& task = tasks[merge.first];
      finish<T>(p, {merge.row, head, 0, merge.count, 0, 0}, false, merge.parts, task.out + head * merge.count * p.size,
                heads * p.size, task.top + head * merge.count, task.sum + head * merge.count, heads);
    }
  };
  // waking the threads a second time costs more than merging a few heads
  if (total * heads * p.size < kSerialMerge) {
    std::atomic<int64_t> next{0};
    merge_all(next);
  } else {
    run_tasks(merges.size() * p.kv_heads, merge_all);
  }
}

template <class T>
void forward(const Forward& p) {
  std::vector<QueryBlock> blocks;
  std::vector<int64_t> few;
  int64_t max_queries = 1;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t stacked = (p.cu_q[row + 1] - p.cu_q[row]) * p.groups;
    const int64_t low = p.slot_range[2 * row], high = p.slot_range[2 * row + 1];
    if (low < high && stacked > 0 && few_queries(p, stacked)) {
      few.push_back(row);
      continue;
    }
    for (int64_t begin = 0; begin < stacked; begin += kTaskQueries) {
      const int64_t count = std::min(kTaskQueries, stacked - begin);
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        const QueryBlock block{row, head, begin, count, low, high};
        if (low == high) {
          finish_empty<T>(p, block);
        } else {
          blocks.push_back(block);
          max_queries = std::max(max_queries, count);
        }
      }
    }
  }
  forward_few<T>(p, few);
  if (blocks.empty()) return;
  const int64_t wanted = std::min(kMaxParts, ceil_div(kWantedTasks, static_cast<int64_t>(blocks.size())));
  const auto part_length = [wanted](const QueryBlock& block) {
    const int64_t slots = block.high - block.low;
    return ceil_div(std::max(ceil_div(slots, wanted), std::min(kMinPart, slots)), kSlots) * kSlots;
  };
  const auto parts_of = [&](const QueryBlock& block) { return ceil_div(block.high - block.low, part_length(block)); };
  int64_t split = 0;  // parts of the blocks that have more than one
  for (const QueryBlock& block : blocks) split += parts_of(block) > 1 ? parts_of(block) : 0;
  const int64_t columns = ceil_div(max_queries, kPanel) * kPanel;
  Floats64 out(split * columns * p.size), top(split * columns), sum(split * columns);
  std::vector<Task> tasks;
  std::vector<Task> merges;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const QueryBlock& block = blocks[i];
    const int64_t length = part_length(block), parts = parts_of(block);
    float *part_out = nullptr, *part_top = nullptr, *part_sum = nullptr;
    if (parts > 1) {
      split -= parts;
      part_out = out.get() + split * columns * p.size;
      part_top = top.get() + split * columns;
      part_sum = sum.get() + split * columns;
      merges.push_back({static_cast<int64_t>(i), 0, parts, part_out, part_top, part_sum});
    }
    for (int64_t low = block.low; low < block.high; low += length) {
      tasks.push_back({static_cast<int64_t>(i), low, std::min(low + length, block.high), part_out, part_top, part_sum});
      if (parts > 1) {
        part_out += columns * p.size;
        part_top += columns;
        part_sum += columns;
      }
    }
  }
  run_tasks(tasks.size(), [&](std::atomic<int64_t>& next) { forward_worker<T>(p, blocks, tasks, max_queries, next); });
  run_tasks(merges.size(), [&](std::atomic<int64_t>& next) {
    for (int64_t i; (i = next++) < static_cast<int64_t>(merges.size());) {
      const Task& merge = merges[i];
      finish<T>(p, blocks[merge.block], true, merge.high, merge.out, columns * p.size, merge.top, merge.sum, columns);
    }
  });
}

// Queries and upstream gradients of some heads, packed for all matmuls of the backward pass.
template <class T>
class Packed {
 public:
  static constexpr int64_t kPer = Traits<T>::kPer;

  Packed(const Backward& p, int64_t panels, bool by_query)
      : units_(ceil_div(p.size, kPer) * kPanel),
        rows_(by_query ? kPanel / kPer * lanes_up(p.size) : 0),
        stride_(2 * units_ + 2 * rows_ + 3 * kPanel),
        data_(panels * stride_) {}

  static int64_t bytes(const Backward& p) {
    return sizeof(float) * (2 * ceil_div(p.size, kPer) * kPanel + 2 * kPanel / kPer * lanes_up(p.size) + 3 * kPanel);
  }

  float* query(int64_t panel) const { return data_.get() + panel * stride_; }  // [units of D][kPanel]
  float* grad(int64_t panel) const { return query(panel) + units_; }           // [units of D][kPanel]
  float* lse(int64_t panel) const { return grad(panel) + units_; }             // [kPanel], to base 2
  float* lse_rest(int64_t panel) const { return lse(panel) + kPanel; }         // [kPanel], what float32 cuts off
  float* delta(int64_t panel) const { return lse_rest(panel) + kPanel; }       // [kPanel]
  float* query_rows(int64_t panel) const { return delta(panel) + kPanel; }     // [units of queries][D]
  float* grad_rows(int64_t panel) const { return query_rows(panel) + rows_; }  // [units of queries][D]

  void fill(const Backward& p, int64_t panel, const QueryBlock& block, float* vector) const {
    std::memset(query(panel), 0, sizeof(float) * stride_);
    for (int64_t i = 0; i < block.count; ++i) {
      const auto [token, head, position] = stacked_query(p, block.row, block.head, block.begin + i);
      const int64_t place = token * p.q_heads + head;
      rotate(p, position, at<T>(p.q, token, head), p.scale < 0 ? -1.0f : 1.0f, vector);
      put_column<T>(vector, p.size, query(panel), i);
      if (rows_) put_row(vector, p.size, query_rows(panel), i);
      const T *grad_out = at<T>(p.grad_out, token, head), *out = at<T>(p.out, token, head);
      double delta = 0;
      for (int64_t d = 0; d < p.size; ++d) {
        vector[d] = to_float(grad_out[d]);
        delta += static_cast<double>(vector[d]) * to_float(out[d]);
      }
      put_column<T>(vector, p.size, grad(panel), i);
      if (rows_) put_row(vector, p.size, grad_rows(panel), i);
      this->delta(panel)[i] = static_cast<float>(delta - (p.grad_lse ? p.grad_lse[place] : 0.0f));
      const double lse = static_cast<double>(p.lse[place]) / kLn2;
      this->lse(panel)[i] = static_cast<float>(lse);
      lse_rest(panel)[i] = static_cast<float>(lse - this->lse(panel)[i]);
    }
  }

 private:
  static void put_row(const float* x, int64_t size, float* rows, int64_t i) {
    float* row = rows + i / kPer * lanes_up(size);
    for (int64_t d = 0; d < size; ++d) put<T>(row, d, i % kPer, x[d]);
  }

  const int64_t units_, rows_, stride_;
  Floats64 data_;
};

// A panel of queries and where its partial gradients are: one [D][kPanel] for each chunk of slots that it reads.
struct Panel {
  QueryBlock block;
  int64_t first_chunk, chunks;
  int64_t partial;
};

template <class T>
class BackwardChunk {
 public:
  static constexpr int64_t kPer = Traits<T>::kPer;
  using E = typename Traits<T>::E;

  BackwardChunk(const Backward& p, const Packed<T>& packed, const std::vector<Panel>& panels, float* partial)
      : p_(p),
        packed_(packed),
        panels_(panels),
        partial_(partial),
        width_(lanes_up(p.size)),
        scores_(kSlots * kPanel),
        grads_(kSlots * kPanel),
        paired_(kSlots / 2 * kPanel),
        keys_(kSlots * width_),
        keys_by_slot_(kSlots * width_),
        values_(kSlots * width_),
        ends_(2 * width_),
        grad_k_(kSlots * width_),
        grad_v_(kSlots * width_) {}

  // Slots [low, high) of one head, which chunk `chunk` holds, against the panels [first, last) of that head.
  void run(int64_t head, int64_t chunk, int64_t low, int64_t high, int64_t first, int64_t last) {
    for (int64_t begin = low; begin < high; begin += kSlots) {
      const int64_t end = std::min(begin + kSlots, high);
      const bool reuse = last - first > 2;
      const Slots k = load_slots<T>(p_.k, begin, end - begin, head, p_.size, true, true, reuse, keys_.get(),
                                    kUsePairs<T> ? keys_by_slot_.get() : keys_.get());
      const Slots v =
          load_slots<T>(p_.v, begin, end - begin, head, p_.size, true, false, reuse, values_.get(), nullptr);
      if (p_.grad_k) {
        std::memset(grad_k_.get(), 0, sizeof(float) * (end - begin) * width_);
        std::memset(grad_v_.get(), 0, sizeof(float) * (end - begin) * width_);
      }
      for (int64_t i = first; i < last; ++i) {
        const Panel& panel = panels_[i];
        const int64_t from = std::max(panel.block.low, begin), to = std::min(panel.block.high, end);
        if (from >= to) continue;
        const bool fresh = from == std::max(panel.block.low, low);
        step(k, v, from - begin, to - begin, i,
             partial_ + (panel.partial + chunk - panel.first_chunk) * p_.size * kPanel, fresh);
      }
      if (!p_.grad_k) continue;
      for (int64_t s = 0; s < end - begin; ++s) {
        const int64_t place = ((begin + s) * p_.kv_heads + head) * p_.size;
        // the packed queries carry the scale's sign
        write(static_cast<T*>(p_.grad_k) + place, grad_k_.get() + s * width_, std::abs(p_.scale));
        write(static_cast<T*>(p_.grad_v) + place, grad_v_.get() + s * width_, 1.0f);
      }
    }
  }

 private:
  static constexpr uint32_t kLowHalf = 0xffff;  // of a pair

  void write(T* to, const float* from, float factor) const {
    for (int64_t d = 0; d < p_.size; ++d) store(to + d, from[d] * factor);
  }

  // Slots [from, to) of the block.
  void step(const Slots& k, const Slots& v, int64_t from, int64_t to, int64_t index, float* grad_q, bool fresh) {
    const int64_t count = panels_[index].block.count, vectors = ceil_div(count, S::kLanes);
    const int64_t units = ceil_div(p_.size, kPer);
    float *scores = scores_.get(), *grads = grads_.get();
    product<E, Start::kZero>({units, k.along_size + from * k.along_size_row, k.along_size_row, 1, packed_.query(index),
                              kPanel, scores + from * kPanel, kPanel},
                             to - from, vectors);
    product<E, Start::kZero>({units, v.along_size + from * v.along_size_row, v.along_size_row, 1, packed_.grad(index),
                              kPanel, grads + from * kPanel, kPanel},
                             to - from, vectors);
    for (int64_t c = 0; c < vectors * S::kLanes; c += S::kLanes) {
      differentiate<T>(from, to, c, index);
    }
    const bool low_end = kUsePairs<T> && from % 2, high_end = kUsePairs<T> && to % 2;
    if (low_end) hide_slot(from / 2, ~kLowHalf, ends_.get());
    if (high_end) hide_slot(to / 2, kLowHalf, ends_.get() + width_);
    const int64_t unit = from / kPer, depth = ceil_div(to, kPer) - unit;
    const Product to_query{depth,
                           k.along_slots + unit * k.along_slots_row,
                           1,
                           k.along_slots_row,
                           (kUsePairs<T> ? paired_.get() : grads) + unit * kPanel,
                           kPanel,
                           grad_q,
                           kPanel};
    if (fresh) {
      product<E, Start::kZero>(to_query, p_.size, vectors);
    } else {
      product<E, Start::kAdd>(to_query, p_.size, vectors);
    }
    if (low_end) show_slot(from / 2, ends_.get());
    if (high_end) show_slot(to / 2, ends_.get() + width_);
    if (!p_.grad_k) return;
    if (count % kPer) hide_absent_query(from, to, count / kPer);
    const int64_t queries = ceil_div(count, kPer);
    product<E, Start::kAdd>({queries, grads + from * kPanel, kPanel, 1, packed_.query_rows(index), width_,
                             grad_k_.get() + from * width_, width_},
                            to - from, width_ / S::kLanes);
    product<E, Start::kAdd>({queries, scores + from * kPanel, kPanel, 1, packed_.grad_rows(index), width_,
                             grad_v_.get() + from * width_, width_},
                            to - from, width_ / S::kLanes);
  }

  static void mask(const float* from, uint32_t half, float* to) {
    uint32_t bits;
    std::memcpy(&bits, from, sizeof bits);
    bits &= half;
    std::memcpy(to, &bits, sizeof bits);
  }

  // Saves a unit of keys and clears the half outside the range: its weight is 0, but 0 * NaN is NaN.
  void hide_slot(int64_t unit, uint32_t half, float* aside) {
    float* keys = keys_by_slot_.get() + unit * p_.size;
    std::memcpy(aside, keys, sizeof(float) * p_.size);
    for (int64_t d = 0; d < p_.size; ++d) mask(aside + d, half, keys + d);
  }

  void show_slot(int64_t unit, const float* aside) {
    std::memcpy(keys_by_slot_.get() + unit * p_.size, aside, sizeof(float) * p_.size);
  }

  // The query that fills the last pair is 0, but its P and dS are NaN where a key is infinite.
  void hide_absent_query(int64_t from, int64_t to, int64_t unit) {
    for (int64_t s = from; s < to; ++s) {
      float *weight = scores_.get() + s * kPanel + unit, *grad = grads_.get() + s * kPanel + unit;
      mask(weight, kLowHalf, weight);
      mask(grad, kLowHalf, grad);
    }
  }

  // Turns scores into weights P, and dP into dS = P (dP - delta), for one vector of queries. Pairs: both as rows of
  // bfloat16, in place, for the sums over queries; dS also paired by slots, for the sum over slots.
  template <class U>
  void differentiate(int64_t from, int64_t to, int64_t c, int64_t index) {
    float *scores = scores_.get() + c, *grads = grads_.get() + c;
    const S::F scale = S::set1(exponent_scale(p_)), delta = S::load(packed_.delta(index) + c);
    const S::F minus_lse = S::sub(S::zero(), S::load(packed_.lse(index) + c));
    const S::F rest = S::load(packed_.lse_rest(index) + c);
    if constexpr (kUsePairs<U>) {
      for (int64_t s = from - from % 2; s < to; s += 2) {
        S::F both[2] = {S::zero(), S::zero()};
        for (int64_t i = std::max(s, from); i < std::min(s + 2, to); ++i) {
          const S::F weight = S::exp2(S::sub(S::fma(S::load(scores + i * kPanel), scale, minus_lse), rest));
          both[i - s] = S::mul(weight, S::sub(S::load(grads + i * kPanel), delta));
          if (!p_.grad_k) continue;
          save_narrow(scores_.get() + i * kPanel + c / 2, weight);
          save_narrow(grads_.get() + i * kPanel + c / 2, both[i - s]);
        }
        S::save(paired_.get() + s / 2 * kPanel + c, pair(both[0], both[1]));
      }
    } else {
      for (int64_t s = from; s < to; ++s) {
        const S::F weight = S::exp2(S::sub(S::fma(S::load(scores + s * kPanel), scale, minus_lse), rest));
        S::save(scores + s * kPanel, weight);
        S::save(grads + s * kPanel, S::mul(weight, S::sub(S::load(grads + s * kPanel), delta)));
      }
    }
  }

  const Backward& p_;
  const Packed<T>& packed_;
  const std::vector<Panel>& panels_;
  float* const partial_;
  const int64_t width_;
  Floats64 scores_, grads_, paired_, keys_, keys_by_slot_, values_, ends_, grad_k_, grad_v_;
};

// Add up a panel's partial gradients, in the order of the chunks, and rotate back.
template <class T>
inline void finish_backward(const Backward& p, const Panel& panel, const float* partial, float* vector) {
  partial += panel.partial * p.size * kPanel;
  for (int64_t i = 0; i < panel.block.count; ++i) {
    const auto [token, head, position] = stacked_query(p, panel.block.row, panel.block.head, panel.block.begin + i);
    for (int64_t d = 0; d < p.size; ++d) {
      float x = 0;
      for (int64_t chunk = 0; chunk < panel.chunks; ++chunk) x += partial[(chunk * p.size + d) * kPanel + i];
      vector[d] = x;
    }
    float* rotated = vector + p.size;
    rotate(p, position, vector, p.scale, rotated, -1.0f);
    T* to = static_cast<T*>(p.grad_q) + (token * p.q_heads + head) * p.size;
    for (int64_t d = 0; d < p.size; ++d) store(to + d, rotated[d]);
  }
}

template <class T>
inline void pack_worker(const Backward& p, const Packed<T>& packed, const std::vector<Panel>& panels,
                        std::atomic<int64_t>& next) {
  Floats64 vector(p.size);
  for (int64_t i; (i = next++) < static_cast<int64_t>(panels.size());) packed.fill(p, i, panels[i].block, vector.get());
}

template <class T>
inline void finish_worker(const Backward& p, const std::vector<Panel>& panels, const float* partial,
                          std::atomic<int64_t>& next) {
  Floats64 vector(2 * p.size);
  for (int64_t i; (i = next++) < static_cast<int64_t>(panels.size());) {
    finish_backward<T>(p, panels[i], partial, vector.get());
  }
}

template <class T>
inline void chunk_worker(const Backward& p, const Packed<T>& packed, const std::vector<Panel>& panels, float* partial,
                         int64_t first_head, int64_t chunk_length, int64_t chunks, int64_t tasks,
                         std::atomic<int64_t>& next) {
  const int64_t heads = tasks / chunks, panels_of_head = static_cast<int64_t>(panels.size()) / heads;
  BackwardChunk<T> state(p, packed, panels, partial);
  for (int64_t i; (i = next++) < tasks;) {
    const int64_t head = i / chunks, chunk = i % chunks;
    state.run(first_head + head, chunk, chunk * chunk_length, std::min((chunk + 1) * chunk_length, p.slots),
              head * panels_of_head, (head + 1) * panels_of_head);
  }
}

template <class T>
void backward(const Backward& p) {
  int64_t panels_of_head = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    panels_of_head += ceil_div((p.cu_q[row + 1] - p.cu_q[row]) * p.groups, kPanel);
  }
  // as many heads at a time as their packed queries have room
  const int64_t packed_bytes = std::max<int64_t>(panels_of_head * Packed<T>::bytes(p), 1);
  const int64_t heads = std::min(p.kv_heads, std::max<int64_t>(kPackedBytes / packed_bytes, 1));
  const int64_t partial_bytes = std::max<int64_t>(heads * panels_of_head * p.size * kPanel * sizeof(float), 1);
  const int64_t wanted = std::max<int64_t>(std::min(ceil_div(kWantedTasks, heads), kPartialBytes / partial_bytes), 1);
  const int64_t chunk_length = std::max(ceil_div(ceil_div(p.slots, wanted), kSlots), int64_t{1}) * kSlots;
  const int64_t chunks = ceil_div(p.slots, chunk_length);
  for (int64_t first_head = 0; first_head < p.kv_heads; first_head += heads) {
    const int64_t last_head = std::min(first_head + heads, p.kv_heads);
    std::vector<Panel> panels;
    int64_t partials = 0;
    for (int64_t head = first_head; head < last_head; ++head) {
      for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t stacked = (p.cu_q[row + 1] - p.cu_q[row]) * p.groups;
        const int64_t low = p.slot_range[2 * row], high = p.slot_range[2 * row + 1];
        const int64_t first_chunk = low / chunk_length;
        const int64_t count = low == high ? 0 : ceil_div(high, chunk_length) - first_chunk;
        for (int64_t begin = 0; begin < stacked; begin += kPanel) {
          panels.push_back(
              {{row, head, begin, std::min(kPanel, stacked - begin), low, high}, first_chunk, count, partials});
          partials += count;
        }
      }
    }
    const Packed<T> packed(p, panels.size(), p.grad_k != nullptr);
    Floats64 partial(partials * p.size * kPanel);
    const int64_t tasks = (last_head - first_head) * chunks;
    run_tasks(panels.size(), [&](std::atomic<int64_t>& next) { pack_worker<T>(p, packed, panels, next); });
    run_tasks(tasks, [&](std::atomic<int64_t>& next) {
      chunk_worker<T>(p, packed, panels, partial.get(), first_head, chunk_length, chunks, tasks, next);
    });
    run_tasks(panels.size(), [&](std::atomic<int64_t>& next) { finish_worker<T>(p, panels, partial.get(), next); });
  }
}
