// CPU kernels of vllm-specplus: tree attention over vLLM's paged KV cache and over a draft's, the
// move of accepted KV slots, what a draft's layers do beside matrix products, and top-k of logits
// rows.
//
// Plain C ABI, called through ctypes (see native.py); compiled as compiler.py says,
// with -march=native once per machine. torch is not included: every tensor arrives as a pointer
// with sizes, and OpenMP runs on the thread pool that torch already owns.
//
// Layout of one page of one KV head in vLLM's CPU cache (block of B tokens,
// head size D); K comes first, V follows after B * D elements:
//   "vec": K is column-major [D][B], V is row-major [B][D]
//   "amx": bf16 in the operand order of the AMX dot product,
//          K [B/16][D/2][16 tokens][2 dims], V [D/16][B/2][16 dims][2 tokens]
// native.py checks these formulas against vLLM's own cache writer at load.
// Of multi-head latent attention a page is "latent": [B][D], one row per token for all query heads;
// keys are the rows, values their first `value_size` elements.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AMX_BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct bf16 {
  uint16_t bits;
  operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  bf16() = default;
  explicit bf16(float f) {  // round to nearest even
    uint32_t u;
    std::memcpy(&u, &f, 4);
    bits = uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};
#if defined(__aarch64__)
typedef __fp16 fp16;  // _Float16 is in C++ since GCC 13 there
#else
typedef _Float16 fp16;
#endif

// 8-bit numbers with MAN bits of mantissa, of a KV cache: e4m3 and e5m2. What a cache holds is
// saturated, never infinite; NaN is read as a number, as there is none with -ffinite-math-only.
template <int MAN>
struct fp8 {
  static constexpr int BIAS = MAN == 3 ? 7 : 15;
  uint8_t bits;
  operator float() const {
    const uint32_t size = uint32_t(bits & 0x7f) << (23 - MAN);
    // A float of the same mantissa; below the least exponent, 1 is in front that does not belong.
    const bool small = size < (1u << 23);
    const uint32_t u = small ? size | uint32_t(128 - BIAS) << 23 : size + (uint32_t(127 - BIAS) << 23);
    float f = __builtin_bit_cast(float, u);
    if (small) f -= __builtin_bit_cast(float, uint32_t(128 - BIAS) << 23);
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, f) | uint32_t(bits & 0x80) << 24);
  }
};
typedef fp8<3> e4m3;
typedef fp8<2> e5m2;

enum Layout { VEC = 0, AMX = 1, LATENT = 2 };

inline int64_t k_offset(int layout, int B, int D, int token, int dim) {
  if (layout == VEC) return int64_t(dim) * B + token;
  return int64_t(token / 16) * 16 * D + (dim / 2) * 32 + (token % 16) * 2 + dim % 2;
}

inline int64_t v_offset(int layout, int B, int D, int token, int dim) {
  if (layout == VEC) return int64_t(token) * D + dim;
  return int64_t(dim / 16) * 16 * B + (token / 2) * 32 + (dim % 16) * 2 + token % 2;
}

// exp for x <= 0, relative error below 3e-7; flushes to 0 below -87. Branch-free
// so that the compiler vectorises the loops that call it (Cephes expf).
inline float exp_neg(float x) {
  float n = std::floor(x * 1.44269504088896341f + 0.5f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return p * __builtin_bit_cast(float, (x < -87.f ? 0 : int32_t(n) + 127) << 23);
}

}  // namespace

// One step's tree batch. Mirrors native.TreeBatch (ctypes.Structure).
struct TreeBatch {
  int32_t num_requests;
  int32_t num_query_heads;
  int32_t num_kv_heads;
  int32_t head_size;         // of queries and keys
  int32_t value_size;        // of values and outputs
  int32_t block_size;
  int32_t layout;            // Layout
  int32_t dtype;             // 0 float32, 1 bfloat16, 2 float16
  int32_t cache_dtype;       // the same of the cache, or 3 float8 e4m3, 4 float8 e5m2
  int32_t max_blocks;        // columns of block_table
  float scale;
  float value_scale;         // of what the cache's values make
  float soft_cap;            // scores become soft_cap * tanh(score / soft_cap); 0: they do not
  int32_t window;            // a row sees so many positions, its own among them; 0: all
  int32_t chunk;             // a row sees its own chunk of so many positions; 0: all
  int64_t page_stride;       // elements between pages of the cache
  int64_t head_stride;       // elements between KV heads of a page
  int64_t query_stride;      // elements between rows of query
  int64_t output_stride;     // elements between rows of output
  const int64_t* rows;       // [T] batch row of each tree row; null: they are the batch's
  const int32_t* row_start;  // [num_requests + 1]
  const int32_t* context;    // [num_requests] cached tokens before the root
  const int32_t* block_table;
  const int32_t* parents;    // [T] within the request, -1 for the root
  const int32_t* first;      // [num_requests] first visible cached token; null: all are
  const int32_t* depths;     // [T] of each tree row, its position less that of its root; null
                             // where nothing goes by positions
  const float* slopes;       // [num_query_heads] ALiBi, times the distance; null: none
  const float* sinks;        // [num_query_heads] a score beside all others; null: none
  const int32_t* query_start;  // [num_requests + 1] where only the last rows of a request attend,
                               // and `rows` are theirs; null: all do
  const int32_t* end;        // [num_requests] end of the visible cached tokens, and position of the
                             // root; null: `context`
  const uint8_t* readable;   // [pages * block_size] which slots of a context are seen; null: all
};

namespace {

// A block of up to 16 (row, query head) pairs of one request and KV head.
constexpr int QUERIES = 16;

struct Task {
  int request, kv_head, first;  // first (row * group + head) of the block
};

struct Scratch {
  std::vector<float> scores;    // [QUERIES][padded tokens]
  std::vector<uint16_t> probs;  // AMX: [QUERIES][padded tokens] bf16
  std::vector<float> out;       // [QUERIES][value_size]
  std::vector<char> query;      // [QUERIES][head_size]
  std::vector<float> wide;      // the same
};

constexpr float HIDDEN = -1e30f;

// Hide the positions from `begin` to `first`, those from `end` to the tree, the request's rows that
// are not ancestors of `row`, and the padding; scores then are 0 probability. `scores` starts at
// token 0 of the context. Where `depths` are null, `first` is in the context.
inline void mask_tree(const int32_t* parents, const int32_t* depths, int row, int begin, int first,
                      int end, int context, int num_rows, int padded, float* scores) {
  for (int j = begin; j < std::min(first, end); ++j) scores[j] = HIDDEN;
  for (int j = std::max(begin, end); j < context; ++j) scores[j] = HIDDEN;
  int next = num_rows;  // rows above `next` are already decided
  for (int r = row; r >= 0 && (!depths || end + depths[r] >= first); r = parents[r]) {
    for (int j = r + 1; j < next; ++j) scores[context + j] = HIDDEN;
    next = r;
  }
  for (int j = 0; j < next; ++j) scores[context + j] = HIDDEN;
  for (int j = context + num_rows; j < padded; ++j) scores[j] = HIDDEN;
}

// In place: scores -> cap * tanh(score / cap), by tanh(|x|) = (1 - e) / (1 + e), e = exp(-2 |x|).
__attribute__((noinline)) void cap_all(float* s, int n, float cap) {
  const float inverse = 1.f / cap;
  for (int i = 0; i < n; ++i) {
    const float x = s[i] * inverse, e = exp_neg(-2.f * std::fabs(x));
    s[i] = std::copysign(cap * (1.f - e) / (1.f + e), x);
  }
}

// ALiBi: the distance of every visible position from the row's own, times the head's slope.
inline void add_distances(const int32_t* depths, int row, int begin, int end, int context,
                          int num_rows, float slope, float* scores) {
  const int own = end + depths[row];
  for (int j = begin; j < context; ++j) scores[j] += slope * float(j - own);
  for (int j = 0; j < num_rows; ++j)
    scores[context + j] += slope * float(depths[j] - depths[row]);
}

// Hide the slots of a context that are not `readable`.
inline void mask_slots(const uint8_t* readable, const int32_t* pages, int block_size, int begin,
                       int end, float* scores) {
  for (int first = begin / block_size * block_size; first < end; first += block_size) {
    const uint8_t* seen = readable + int64_t(pages[first / block_size]) * block_size;
    const int last = std::min(end, first + block_size);
    for (int j = std::max(begin, first); j < last; ++j)
      scores[j] = seen[j - first] ? scores[j] : HIDDEN;
  }
}

// Out of line: inlined below, GCC 12 no longer vectorises it (5 times slower).
__attribute__((noinline)) void exp_all(float* s, int n, float shift) {
  for (int i = 0; i < n; ++i) s[i] = exp_neg(s[i] - shift);
}

__attribute__((noinline)) float greatest(const float* s, int n) {
  float top = s[0];
  for (int i = 1; i < n; ++i) top = std::max(top, s[i]);
  return top;
}

__attribute__((noinline)) float sum_all(const float* s, int n) {
  float sum = 0.f;
  for (int i = 0; i < n; ++i) sum += s[i];
  return sum;
}

// In place: scores -> exp(scores - max). Returns the sum, that of a `sink` included.
inline float softmax_numerators(float* s, int n, const float* sink) {
  float top = greatest(s, n);
  if (sink) top = std::max(top, *sink);
  exp_all(s, n, top);
  const float beside = sink ? std::exp(*sink - top) : 0.f;
  return beside + sum_all(s, n);
}

// What fits a vector register, and how many queries share what was loaded and widened: their sums
// stay in registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, SCORED = 8, VALUED = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, SCORED = 4, VALUED = 2;
#else
constexpr int LANES = 4, SCORED = 4, VALUED = 4;
#endif
typedef float Floats __attribute__((vector_size(LANES * 4)));

inline Floats widen(const float* x) {
  Floats out;
  std::memcpy(&out, x, sizeof out);
  return out;
}

inline Floats widen(const bf16* x) {
  typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
  typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

inline Floats widen(const fp16* x) {
  Floats out;
  for (int i = 0; i < LANES; ++i) out[i] = float(x[i]);
  return out;
}

template <int MAN>
inline Floats widen(const fp8<MAN>* x) {
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
  constexpr uint32_t BASE = uint32_t(128 - fp8<MAN>::BIAS) << 23;
  Bytes bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  const Words words = __builtin_convertvector(bytes, Words);
  const Words size = (words & 0x7f) << (23 - MAN);
  const Floats normal = reinterpret_cast<Floats>(size + (uint32_t(127 - fp8<MAN>::BIAS) << 23));
  const Floats small = reinterpret_cast<Floats>(size | BASE) - __builtin_bit_cast(float, BASE);
  const Floats both = size < (1u << 23) ? small : normal;
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(both) | (words & 0x80) << 24);
}

// QK^T and PV for the "vec" layout: float arithmetic on any storage type, `T` of the queries and
// `C` of the cache. Each key and value is widened once for several queries; a product takes one
// multiply-add.
template <typename T, typename C>
struct VecProducts {
  static constexpr int TOKENS = 16;  // tokens per inner step; pages are multiples of it

  // Scores of M queries and TOKENS tokens, whose keys are `k` [D][B].
  template <int M>
  static void score(const C* k, int B, int D, float scale, const float* query, float* out,
                    int padded) {
    constexpr int N = TOKENS / LANES;
    Floats sums[M][N] = {};
    for (int d = 0; d < D; ++d) {
      Floats keys[N];
      for (int n = 0; n < N; ++n) keys[n] = widen(k + int64_t(d) * B + n * LANES);
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sums[m][n] += query[m * D + d] * keys[n];
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) {
        const Floats scaled = sums[m][n] * scale;
        std::memcpy(out + int64_t(m) * padded + n * LANES, &scaled, sizeof scaled);
      }
  }

  static void scores(const TreeBatch& b, const C* cache, const int32_t* pages, int kv_head,
                     const T* query, int n_queries, int begin, int tokens, int padded,
                     Scratch& s) {
    const int B = b.block_size, D = b.head_size;
    for (int i = 0; i < n_queries * D; ++i) s.wide[i] = float(query[i]);
    for (int t0 = begin; t0 < padded; t0 += TOKENS) {
      const C* k = cache + pages[t0 / B] * b.page_stride + kv_head * b.head_stride + t0 % B;
      int m = 0;
      const auto many = [&](auto count) {
        constexpr int M = decltype(count)::value;
        for (; m + M <= n_queries; m += M)
          score<M>(k, B, D, b.scale, s.wide.data() + m * D,
                   s.scores.data() + int64_t(m) * padded + t0, padded);
      };
      many(std::integral_constant<int, SCORED>());
      many(std::integral_constant<int, 4>());
      many(std::integral_constant<int, 2>());
      many(std::integral_constant<int, 1>());
    }
  }

  // Sums over the tokens of what M queries and N vectors of the head's values make.
  template <int M, int N>
  static void value(const TreeBatch& b, const C* cache, const int32_t* pages, int64_t offset,
                    const float* probs, int begin, int tokens, int padded, float* out) {
    const int B = b.block_size, D = b.head_size;
    Floats sums[M][N] = {};
    for (int t0 = begin; t0 < tokens; t0 += TOKENS) {
      const C* v = cache + pages[t0 / B] * b.page_stride + offset + int64_t(t0 % B) * D;
      const int end = std::min(t0 + TOKENS, tokens);
      for (int t = t0; t < end; ++t, v += D) {
        Floats values[N];
        for (int c = 0; c < N; ++c) values[c] = widen(v + c * LANES);
        for (int m = 0; m < M; ++m)
          for (int c = 0; c < N; ++c) sums[m][c] += probs[int64_t(m) * padded + t] * values[c];
      }
    }
    for (int m = 0; m < M; ++m) std::memcpy(out + m * D, sums[m], sizeof sums[m]);
  }

  template <int N>
  static void columns(const TreeBatch& b, const C* cache, const int32_t* pages, int kv_head,
                      int n_queries, int begin, int tokens, int padded, Scratch& s, int& d0) {
    for (; d0 + N * LANES <= b.head_size; d0 += N * LANES) {
      const int64_t offset =
          kv_head * b.head_stride + int64_t(b.block_size) * b.head_size + d0;
      int m = 0;
      const auto many = [&](auto count) {
        constexpr int M = decltype(count)::value;
        for (; m + M <= n_queries; m += M)
          value<M, N>(b, cache, pages, offset, s.scores.data() + int64_t(m) * padded, begin,
                      tokens, padded, s.out.data() + m * b.head_size + d0);
      };
      many(std::integral_constant<int, VALUED>());
      many(std::integral_constant<int, 2>());
      many(std::integral_constant<int, 1>());
    }
  }

  static void values(const TreeBatch& b, const C* cache, const int32_t* pages, int kv_head,
                     int n_queries, int begin, int tokens, int padded, Scratch& s) {
    int d0 = 0;
    columns<4>(b, cache, pages, kv_head, n_queries, begin, tokens, padded, s, d0);
    columns<1>(b, cache, pages, kv_head, n_queries, begin, tokens, padded, s, d0);
    rest(b, cache, pages, kv_head, n_queries, begin, tokens, padded, s, d0);
  }

  // Columns from `d0` on, fewer than a register holds.
  static void rest(const TreeBatch& b, const C* cache, const int32_t* pages, int kv_head,
                   int n_queries, int begin, int tokens, int padded, Scratch& s, int d0) {
    const int B = b.block_size, D = b.head_size;
    for (int m = 0; m < n_queries && d0 < D; ++m) {
      std::fill_n(s.out.data() + m * D + d0, D - d0, 0.f);
      for (int t = begin; t < tokens; ++t) {
        const C* v = cache + pages[t / B] * b.page_stride + kv_head * b.head_stride +
                     int64_t(B) * D + int64_t(t % B) * D;
        const float p = s.scores[int64_t(m) * padded + t];
        for (int d = d0; d < D; ++d) s.out[m * D + d] += p * float(v[d]);
      }
    }
  }
};

// QK^T and PV for the "latent" layout, whose rows are as wide as some vector registers.
template <typename T>
struct LatentProducts {
  static constexpr int TOKENS = 16;  // pages are multiples of it

  // Scores of M queries and one token.
  template <int M>
  static void score(const T* k, int D, float scale, const float* query, float* out, int padded) {
    Floats sums[M] = {};
    for (int d = 0; d < D; d += LANES) {
      const Floats key = widen(k + d);
      for (int m = 0; m < M; ++m) sums[m] += widen(query + m * D + d) * key;
    }
    for (int m = 0; m < M; ++m) {
      float sum = 0.f;
      for (int i = 0; i < LANES; ++i) sum += sums[m][i];
      out[int64_t(m) * padded] = sum * scale;
    }
  }

  static void scores(const TreeBatch& b, const T* cache, const int32_t* pages, int,
                     const T* query, int n_queries, int begin, int tokens, int padded,
                     Scratch& s) {
    const int B = b.block_size, D = b.head_size;
    for (int i = 0; i < n_queries * D; ++i) s.wide[i] = float(query[i]);
    for (int t = begin; t < tokens; ++t) {
      const T* k = cache + pages[t / B] * b.page_stride + int64_t(t % B) * D;
      int m = 0;
      const auto many = [&](auto count) {
        constexpr int M = decltype(count)::value;
        for (; m + M <= n_queries; m += M)
          score<M>(k, D, b.scale, s.wide.data() + m * D, s.scores.data() + int64_t(m) * padded + t,
                   padded);
      };
      many(std::integral_constant<int, SCORED>());
      many(std::integral_constant<int, 1>());
    }
  }

  // Sums over the tokens of what M queries and N vectors of the values, from `d0`, make.
  template <int M, int N>
  static void value(const TreeBatch& b, const T* cache, const int32_t* pages, int d0,
                    const float* probs, int begin, int tokens, int padded, float* out) {
    const int B = b.block_size;
    Floats sums[M][N] = {};
    for (int t = begin; t < tokens; ++t) {
      const T* v = cache + pages[t / B] * b.page_stride + int64_t(t % B) * b.head_size + d0;
      Floats values[N];
      for (int c = 0; c < N; ++c) values[c] = widen(v + c * LANES);
      for (int m = 0; m < M; ++m)
        for (int c = 0; c < N; ++c) sums[m][c] += probs[int64_t(m) * padded + t] * values[c];
    }
    for (int m = 0; m < M; ++m) std::memcpy(out + m * b.value_size + d0, sums[m], sizeof sums[m]);
  }

  static void values(const TreeBatch& b, const T* cache, const int32_t* pages, int, int n_queries,
                     int begin, int tokens, int padded, Scratch& s) {
    int d0 = 0;
    const auto columns = [&](auto count) {
      constexpr int N = decltype(count)::value;
      for (; d0 + N * LANES <= b.value_size; d0 += N * LANES) {
        int m = 0;
        const auto many = [&](auto queries) {
          constexpr int M = decltype(queries)::value;
          for (; m + M <= n_queries; m += M)
            value<M, N>(b, cache, pages, d0, s.scores.data() + int64_t(m) * padded, begin, tokens,
                        padded, s.out.data() + m * b.value_size);
        };
        many(std::integral_constant<int, VALUED>());
        many(std::integral_constant<int, 1>());
      }
    };
    columns(std::integral_constant<int, 4>());
    columns(std::integral_constant<int, 1>());
  }
};

#if defined(__AMX_BF16__)
// QK^T and PV for the "amx" layout: 16 queries x 16 columns x 32 deep per
// instruction; K and V tiles are used as they lie in the cache. Like vLLM's own
// kernel: float accumulation, probabilities rounded to bf16.
struct AmxProducts {
  static constexpr int TOKENS = 32;

  static bool permit() {  // Linux grants the tile registers per process, on request
    static const bool ok = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
    return ok;
  }

  static void configure() {
    alignas(64) uint8_t cfg[64] = {};
    cfg[0] = 1;  // palette
    for (int t = 0; t < 8; ++t) {
      reinterpret_cast<uint16_t*>(cfg + 16)[t] = 64;  // bytes per row
      cfg[48 + t] = 16;                                // rows
    }
    _tile_loadconfig(cfg);
  }

  static void scores(const TreeBatch& b, const bf16* cache, const int32_t* pages, int kv_head,
                     const bf16* query, int, int begin, int tokens, int padded, Scratch& s) {
    const int B = b.block_size, D = b.head_size;
    for (int t0 = begin; t0 < padded; t0 += TOKENS) {
      const bf16* k = cache + pages[t0 / B] * b.page_stride + kv_head * b.head_stride +
                      int64_t(t0 % B) * D;
      _tile_zero(0);
      _tile_zero(1);
      for (int d = 0; d < D; d += 32) {
        _tile_loadd(2, query + d, D * 2);
        _tile_loadd(3, k + d * 16, 64);
        _tile_loadd(4, k + 16 * D + d * 16, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
      }
      _tile_stored(0, s.scores.data() + t0, padded * 4);
      _tile_stored(1, s.scores.data() + t0 + 16, padded * 4);
    }
    for (float& x : s.scores) x *= b.scale;
  }

  static void values(const TreeBatch& b, const bf16* cache, const int32_t* pages, int kv_head,
                     int n_queries, int begin, int tokens, int padded, Scratch& s) {
    const int B = b.block_size, D = b.head_size;
    for (int64_t i = 0; i < int64_t(n_queries) * padded; ++i)
      s.probs[i] = bf16(s.scores[i]).bits;
    for (int d0 = 0; d0 < D; d0 += 32) {
      _tile_zero(0);
      _tile_zero(1);
      for (int t0 = begin; t0 < padded; t0 += TOKENS) {
        const bf16* v = cache + pages[t0 / B] * b.page_stride + kv_head * b.head_stride +
                        int64_t(B) * D + int64_t(d0) * B + (t0 % B) * 16;
        _tile_loadd(2, s.probs.data() + t0, padded * 2);
        _tile_loadd(3, v, 64);
        _tile_loadd(4, v + 16 * B, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
      }
      _tile_stored(0, s.out.data() + d0, D * 4);
      _tile_stored(1, s.out.data() + d0 + 16, D * 4);
    }
  }
};
#endif

template <typename T, typename C, typename Products>
void attend(const TreeBatch& b, const Task& task, const T* query, const C* cache, T* output,
            Scratch& s) {
  const int D = b.head_size, V = b.value_size, group = b.num_query_heads / b.num_kv_heads;
  const int row0 = b.row_start[task.request];
  const int num_rows = b.row_start[task.request + 1] - row0;
  const int32_t* starts = b.query_start ? b.query_start : b.row_start;
  const int query0 = starts[task.request], num_queries = starts[task.request + 1] - query0;
  const int keys_only = num_rows - num_queries;
  const int context = b.context[task.request], tokens = context + num_rows;
  const int end = b.end ? b.end[task.request] : context;
  const int first = b.first ? b.first[task.request] : 0;
  const int padded = (tokens + Products::TOKENS - 1) / Products::TOKENS * Products::TOKENS;
  const int n_queries = std::min(QUERIES, num_queries * group - task.first);
  const int32_t* pages = b.block_table + int64_t(task.request) * b.max_blocks;
  const int32_t* parents = b.parents + row0;
  const int32_t* depths = b.depths ? b.depths + row0 : nullptr;
  // What each row sees begins there; nothing before the earliest is looked at.
  const auto seen_from = [&](int row) {
    int from = first;
    if (b.window) from = std::max(from, end + depths[row] - b.window + 1);
    if (b.chunk) from = std::max(from, (end + depths[row]) / b.chunk * b.chunk);
    return from;
  };
  int earliest = context;
  for (int row = task.first / group; row <= (task.first + n_queries - 1) / group; ++row)
    earliest = std::min(earliest, seen_from(keys_only + row));
  const int begin = earliest / Products::TOKENS * Products::TOKENS;

  s.scores.resize(size_t(QUERIES) * padded);
  s.probs.resize(size_t(QUERIES) * padded);
  s.out.resize(size_t(QUERIES) * V);
  s.query.assign(size_t(QUERIES) * D * sizeof(T), 0);
  s.wide.resize(size_t(QUERIES) * D);
  const auto batch_row = [&](int row) { return b.rows ? b.rows[query0 + row] : query0 + row; };
  T* q = reinterpret_cast<T*>(s.query.data());
  for (int m = 0; m < n_queries; ++m) {
    const int row = (task.first + m) / group, head = (task.first + m) % group;
    std::memcpy(q + m * D,
                query + batch_row(row) * b.query_stride +
                    (task.kv_head * group + head) * int64_t(D),
                D * sizeof(T));
  }
  Products::scores(b, cache, pages, task.kv_head, q, n_queries, begin, tokens, padded, s);
  float sums[QUERIES];
  for (int m = 0; m < n_queries; ++m) {
    float* line = s.scores.data() + int64_t(m) * padded;
    const int row = keys_only + (task.first + m) / group;
    const int head = task.kv_head * group + (task.first + m) % group;
    if (b.soft_cap > 0.f) cap_all(line + begin, tokens - begin, b.soft_cap);
    if (b.slopes)
      add_distances(depths, row, begin, end, context, num_rows, b.slopes[head], line);
    mask_tree(parents, depths, row, begin, seen_from(row), end, context, num_rows, padded, line);
    if (b.readable) mask_slots(b.readable, pages, b.block_size, begin, end, line);
    sums[m] = softmax_numerators(line + begin, padded - begin, b.sinks ? b.sinks + head : nullptr);
  }
  Products::values(b, cache, pages, task.kv_head, n_queries, begin, tokens, padded, s);
  for (int m = 0; m < n_queries; ++m) {
    const int row = (task.first + m) / group, head = (task.first + m) % group;
    T* out = output + batch_row(row) * b.output_stride +
             (task.kv_head * group + head) * int64_t(V);
    const float inv = b.value_scale / sums[m];
    for (int d = 0; d < V; ++d) out[d] = T(s.out[m * V + d] * inv);
  }
}

template <typename T, typename C, typename Products>
void attend_all(const TreeBatch& b, const void* query, const void* cache, void* output) {
  const int group = b.num_query_heads / b.num_kv_heads;
  const int32_t* starts = b.query_start ? b.query_start : b.row_start;
  std::vector<Task> tasks;
  for (int r = 0; r < b.num_requests; ++r) {
    const int queries = (starts[r + 1] - starts[r]) * group;
    for (int h = 0; h < b.num_kv_heads; ++h)
      for (int first = 0; first < queries; first += QUERIES) tasks.push_back({r, h, first});
  }
#pragma omp parallel
  {
    static thread_local Scratch scratch;
#if defined(__AMX_BF16__)
    if (b.layout == AMX) AmxProducts::configure();
#endif
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i)
      attend<T, C, Products>(b, tasks[i], static_cast<const T*>(query),
                             static_cast<const C*>(cache), static_cast<T*>(output), scratch);
#if defined(__AMX_BF16__)
    if (b.layout == AMX) _tile_release();
#endif
  }
}

template <typename T>
void attend_vec(const TreeBatch& b, const void* query, const void* cache, void* output) {
  if (b.layout == LATENT) return attend_all<T, T, LatentProducts<T>>(b, query, cache, output);
  if (b.cache_dtype == 3) return attend_all<T, e4m3, VecProducts<T, e4m3>>(b, query, cache, output);
  if (b.cache_dtype == 4) return attend_all<T, e5m2, VecProducts<T, e5m2>>(b, query, cache, output);
  attend_all<T, T, VecProducts<T, T>>(b, query, cache, output);
}

// Largest of `count` numbers, and whether any is NaN. As integers, of which more lanes fit where
// numbers are short, and because -ffinite-math-only knows no NaN: numbers are ordered like their
// bits, those below zero the other way round, and an infinity's are the largest of no NaN.
template <typename T>
float largest(const T* x, int64_t count, bool& nan) {
  using Int = std::conditional_t<sizeof(T) == 2, int16_t, int32_t>;
  constexpr Int SIZE = sizeof(T) == 2 ? 0x7fff : 0x7fffffff;
  constexpr Int INFINITE = sizeof(T) == 4             ? 0x7f800000
                           : std::is_same_v<T, bf16> ? 0x7f80
                                                     : 0x7c00;
  Int best = -SIZE - 1, size = 0;
  for (int64_t i = 0; i < count; ++i) {
    Int bits;
    std::memcpy(&bits, x + i, sizeof(T));
    size = std::max(size, Int(bits & SIZE));
    best = std::max(best, Int(bits < 0 ? bits ^ SIZE : bits));
  }
  nan |= size > INFINITE;
  if (best < 0) best ^= SIZE;
  T out;
  std::memcpy(&out, &best, sizeof(T));
  return float(out);
}

// Top k of one row, best first, ties to the lower index (as argmax does). Where the row holds a
// NaN, the first value is one: no ids mean anything then.
template <typename T>
void top_k_row(const T* x, int64_t n, int k, int32_t* ids, float* values) {
  constexpr int BLOCK = 64;
  for (int j = 0; j < k; ++j) values[j] = -FLT_MAX, ids[j] = -1;
  int filled = 0;
  auto offer = [&](float v, int32_t i) {
    if (filled == k && !(v > values[k - 1])) return;
    int j = filled < k ? filled++ : k - 1;
    for (; j > 0 && v > values[j - 1]; --j) values[j] = values[j - 1], ids[j] = ids[j - 1];
    values[j] = v, ids[j] = i;
  };
  int64_t i = 0;
  bool nan = false;
  for (; i + BLOCK <= n; i += BLOCK) {
    const float best = largest(x + i, BLOCK, nan);
    if (filled == k && !(best > values[k - 1])) continue;
    for (int j = 0; j < BLOCK; ++j) offer(float(x[i + j]), int32_t(i + j));
  }
  for (; i < n; ++i) {
    offer(largest(x + i, 1, nan), int32_t(i));
  }
  constexpr uint32_t NOT_A_NUMBER = 0x7fc00000;
  if (nan) std::memcpy(values, &NOT_A_NUMBER, sizeof(float));
}

template <typename T>
void top_k_all(const void* x, int64_t rows, int64_t n, int64_t stride, int k, int32_t* ids,
               float* values) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    top_k_row(static_cast<const T*>(x) + r * stride, n, k, ids + r * k, values + r * k);
}

template <typename T>
void move_all(const TreeBatch& b, void* const* caches, int num_layers, const int64_t* src,
              const int64_t* dst, int n) {
  const int B = b.block_size, D = b.head_size;
#pragma omp parallel for schedule(static)
  for (int l = 0; l < num_layers; ++l) {
    T* cache = static_cast<T*>(caches[l]);
    for (int i = 0; i < n; ++i)  // in order: a destination never precedes its own source's reader
      for (int h = 0; h < b.num_kv_heads; ++h) {
        const T* from = cache + src[i] / B * b.page_stride + h * b.head_stride;
        T* to = cache + dst[i] / B * b.page_stride + h * b.head_stride;
        const int s = int(src[i] % B), t = int(dst[i] % B);
        for (int d = 0; d < D; ++d) {
          to[k_offset(b.layout, B, D, t, d)] = from[k_offset(b.layout, B, D, s, d)];
          to[int64_t(B) * D + v_offset(b.layout, B, D, t, d)] =
              from[int64_t(B) * D + v_offset(b.layout, B, D, s, d)];
        }
      }
  }
}

// Write keys and values of n tokens, `stride` elements apart, at their slots.
template <typename T>
void store_all(const TreeBatch& b, T* cache, const T* keys, const T* values, int64_t stride,
               const int64_t* slots, int n) {
  const int B = b.block_size, D = b.head_size;
  for (int i = 0; i < n; ++i, keys += stride, values += stride)
    for (int h = 0; h < b.num_kv_heads; ++h) {
      T* page = cache + slots[i] / B * b.page_stride + h * b.head_stride;
      const int t = int(slots[i] % B);
      for (int d = 0; d < D; ++d) {
        page[k_offset(b.layout, B, D, t, d)] = keys[h * D + d];
        page[int64_t(B) * D + v_offset(b.layout, B, D, t, d)] = values[h * D + d];
      }
    }
}

// Calls `run` with a value of the type that `dtype` names.
template <typename F>
void by_type(int dtype, const F& run) {
  dtype == 0 ? run(float()) : dtype == 1 ? run(bf16()) : run(fp16());
}

// As transformers has it: what is normed is rounded before its weight multiplies it.
template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int size, float eps) {
  float sum = 0.f;
  for (int i = 0; i < size; ++i) sum += float(x[i]) * float(x[i]);
  const float scale = 1.f / std::sqrt(sum / float(size) + eps);
  for (int i = 0; i < size; ++i) out[i] = T(float(T(float(x[i]) * scale)) * float(weight[i]));
}

// Rotate the halves of one head's elements, in place.
template <typename T>
void rotate(T* x, const T* cos, const T* sin, int size) {
  const int half = size / 2;
  for (int i = 0; i < half; ++i) {
    const float a = float(x[i]), b = float(x[half + i]);
    x[i] = T(a * float(cos[i]) - b * float(sin[i]));
    x[half + i] = T(b * float(cos[half + i]) + a * float(sin[half + i]));
  }
}

}  // namespace

extern "C" {

// 0 when this build serves (layout, dtype, sizes), else the number of the reason (native.py).
int specplus_tree_attention_unsupported(const TreeBatch* b) {
  if (b->layout == VEC) return b->block_size % 16 ? 1 : 0;
  if (b->layout == LATENT)
    return b->block_size % 16 ? 1 : b->head_size % 16 || b->value_size % 16 ? 5 : 0;
#if defined(__AMX_BF16__)
  if (b->dtype != 1 || b->cache_dtype != 1 || b->head_size % 32 || b->block_size % 32) return 2;
  return AmxProducts::permit() ? 0 : 3;
#else
  return 4;
#endif
}

// Attention of every tree row; K and V of all rows are in the cache already.
void specplus_tree_attention(const TreeBatch* b, const void* query, const void* cache,
                             void* output) {
#if defined(__AMX_BF16__)
  if (b->layout == AMX) return attend_all<bf16, bf16, AmxProducts>(*b, query, cache, output);
#endif
  if (b->dtype == 0) return attend_vec<float>(*b, query, cache, output);
  if (b->dtype == 1) return attend_vec<bf16>(*b, query, cache, output);
  attend_vec<fp16>(*b, query, cache, output);
}

// Copy KV slots src[i] -> dst[i], in order, in every layer.
void specplus_move_slots(const TreeBatch* b, void* const* caches, int num_layers,
                         const int64_t* src, const int64_t* dst, int n) {
  if (b->cache_dtype == 0)
    move_all<float>(*b, caches, num_layers, src, dst, n);
  else if (b->cache_dtype >= 3)
    move_all<uint8_t>(*b, caches, num_layers, src, dst, n);
  else
    move_all<uint16_t>(*b, caches, num_layers, src, dst, n);
}

// Write keys and values [n, num_kv_heads, head_size], whose rows are `stride` elements apart, at
// slots [n] of a cache.
void specplus_store_slots(const TreeBatch* b, void* cache, const void* keys, const void* values,
                          int64_t stride, const int64_t* slots, int n) {
  by_type(b->cache_dtype, [&](auto zero) {
    using T = decltype(zero);
    store_all(*b, static_cast<T*>(cache), static_cast<const T*>(keys),
              static_cast<const T*>(values), stride, slots, n);
  });
}

// out [rows, size]: x [rows, size] by the root of its mean square, times weight [size].
void specplus_rms_norm(const void* x, const void* weight, void* out, int dtype, int64_t rows,
                       int size, float eps) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
#pragma omp parallel for schedule(static) if (rows > 16)
    for (int64_t r = 0; r < rows; ++r)
      rms_norm(static_cast<const T*>(x) + r * size, static_cast<const T*>(weight),
               static_cast<T*>(out) + r * size, size, eps);
  });
}

// Rotary positions of x [rows, heads, size], rows `stride` elements apart, in place; cos and sin
// [rows, size].
void specplus_rotate(void* x, const void* cos, const void* sin, int dtype, int64_t rows,
                     int64_t stride, int heads, int size) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t r = 0; r < rows; ++r)
      for (int h = 0; h < heads; ++h)
        rotate(static_cast<T*>(x) + r * stride + int64_t(h) * size,
               static_cast<const T*>(cos) + r * size, static_cast<const T*>(sin) + r * size, size);
  });
}

// ids int32 [rows, k], values float32 [rows, k] of x [rows, n] with row stride.
void specplus_top_k(const void* x, int dtype, int64_t rows, int64_t n, int64_t stride, int k,
                    int32_t* ids, float* values) {
  if (dtype == 0)
    top_k_all<float>(x, rows, n, stride, k, ids, values);
  else if (dtype == 1)
    top_k_all<bf16>(x, rows, n, stride, k, ids, values);
  else
    top_k_all<fp16>(x, rows, n, stride, k, ids, values);
}

// Element offset of (token, dim) in a page, for the check against vLLM's cache writer.
int64_t specplus_kv_offset(int layout, int value, int block_size, int head_size, int token,
                           int dim) {
  if (value) return int64_t(block_size) * head_size + v_offset(layout, block_size, head_size, token, dim);
  return k_offset(layout, block_size, head_size, token, dim);
}

}  // extern "C"
