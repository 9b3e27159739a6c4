// Attention of a few query rows over many keys, for a CPU: softmax(q k^T * scale + mask) v, sums and scores in float32.
//
// Keys are taken a block at a time: widened to float32 once for all rows, multiplied with queries that lie transposed,
// so that a lane of a vector is a row and nothing is summed across lanes, and folded into a running softmax. Many rows
// are taken in pieces. Where there are more threads than pieces, each takes a part of the keys, and the parts are merged.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("O3", "fp-contract=fast")
#endif

namespace {

using torch::stable::Tensor;

constexpr int64_t LANES = 16, BLOCK = 64, AT_ONCE = 8, LEAST_KEYS = 512, MOST_WIDE = 512, MOST_ROWS = 64;
constexpr float LOWEST = -1e30f, LOG2_E = 1.44269504f;

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));

inline Vector& at(float* place) { return *reinterpret_cast<Vector*>(place); }

int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

inline float widened(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
inline float widened(float value) { return value; }

inline Vector vector(const uint16_t* from) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Integers) << 16);
}
inline Vector vector(const float* from) { return *reinterpret_cast<const Vector*>(from); }

inline void narrowed(float value, float& to) { to = value; }
inline void narrowed(float value, uint16_t& to) {  // to the nearest bfloat16, ties to even
  uint32_t word;
  std::memcpy(&word, &value, 4);
  to = value != value ? 0x7fc0 : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// 2^x with x split into an integer, which becomes the exponent, and a rest in [-1/2, 1/2], of which the series is taken.
inline Vector exp2(Vector x) {
  const Integers hidden = x <= -126.0f;  // not "x > -126": what is no number stays none
  const Vector shift = Vector{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector whole = x + shift;
  const Vector rest = x - (whole - shift);
  Vector series = Vector{} + 1.54035304e-4f;
  for (float next : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 0.240226507f, 0.693147181f, 1.0f})
    series = series * rest + next;
  const Words exponent = ((Words)whole - (Words)shift + 127) << 23;
  return (Vector)((Integers)(series * (Vector)exponent) & ~hidden);
}

inline Vector larger(Vector one, Vector other) {
  const Integers first = one > other;
  return (Vector)(((Integers)one & first) | ((Integers)other & ~first));
}

struct Sizes {
  int64_t rows, keys, size, masked;  // query rows, keys, head size; the last keys that the mask speaks of
  int64_t lanes() const { return padded(rows, LANES); }
  int64_t width() const { return padded(size, 2 * LANES); }
};

// What has been found of a range of keys: sums weighted by 2^(score - largest), and of the weights.
struct Found {
  std::vector<float> sums, largest, weights;
  explicit Found(const Sizes& of)
      : sums(padded(of.rows, 4) * of.width()), largest(of.lanes(), LOWEST), weights(of.lanes()) {}
};

// Rows of numbers in float32, `width` to a row: as they lie in memory, or widened into a scratch.
struct Rows {
  const float* first;
  int64_t stride;
  const float* operator[](int64_t row) const { return first + row * stride; }
};

inline Rows widen(const uint16_t* from, int64_t stride, int64_t count, int64_t size, int64_t width, float* scratch) {
  const int64_t whole = size / LANES * LANES;
  for (int64_t k = 0; k < count; ++k, from += stride) {
    float* to = scratch + k * width;
    for (int64_t d = 0; d < whole; d += LANES) at(to + d) = vector(from + d);
    for (int64_t d = whole; d < size; ++d) to[d] = widened(from[d]);
  }
  return {scratch, width};
}
inline Rows widen(const float* from, int64_t stride, int64_t count, int64_t size, int64_t width, float* scratch) {
  if (size == width) return {from, stride};
  for (int64_t k = 0; k < count; ++k) std::copy_n(from + k * stride, size, scratch + k * width);
  return {scratch, width};
}

// Queries with their rows in lanes, to be multiplied with keys: scores[k][lane] = query . key.
template <class Scalar>
struct Queries {
  const Sizes of;
  std::vector<float> columns;

  Queries(const Scalar* query, const Sizes& of) : of(of), columns(of.size * of.lanes()) {
    for (int64_t r = 0; r < of.rows; ++r)
      for (int64_t d = 0; d < of.size; ++d) columns[d * of.lanes() + r] = widened(query[r * of.size + d]);
  }

  void multiply(const Scalar* key, int64_t stride, int64_t count, float* scores) const {
    float wide[AT_ONCE * MOST_WIDE];
    for (int64_t k = 0; k < count; k += AT_ONCE) {
      const int64_t last = std::min(AT_ONCE, count - k) - 1;
      const Rows keys = widen(key + k * stride, stride, last + 1, of.size, of.size, wide);
      const float* rows[AT_ONCE];
      for (int64_t j = 0; j < AT_ONCE; ++j) rows[j] = keys[std::min(j, last)];
      for (int64_t lane = 0; lane < of.lanes(); lane += LANES) {
        Vector sum[AT_ONCE] = {};
        for (int64_t d = 0; d < of.size; ++d)
          for (int64_t j = 0; j < AT_ONCE; ++j) sum[j] += vector(&columns[d * of.lanes() + lane]) * rows[j][d];
        for (int64_t j = 0; j < AT_ONCE; ++j) at(scores + (k + j) * of.lanes() + lane) = sum[j];
      }
    }
  }
};

#ifdef __AVX512BF16__
// The same with two products at a time.
template <>
struct Queries<uint16_t> {
  const Sizes of;
  std::vector<uint32_t> pairs;

  Queries(const uint16_t* query, const Sizes& of) : of(of), pairs((of.size + 1) / 2 * of.lanes()) {
    for (int64_t r = 0; r < of.rows; ++r)
      for (int64_t d = 0; d < of.size; ++d)
        pairs[d / 2 * of.lanes() + r] |= uint32_t(query[r * of.size + d]) << (d % 2 * 16);
  }

  void multiply(const uint16_t* key, int64_t stride, int64_t count, float* scores) const {
    for (int64_t k = 0; k < count; k += AT_ONCE) {
      const uint16_t* keys[AT_ONCE];
      for (int64_t j = 0; j < AT_ONCE; ++j) keys[j] = key + std::min(k + j, count - 1) * stride;
      for (int64_t lane = 0; lane < of.lanes(); lane += LANES) {
        __m512 sum[AT_ONCE] = {};
        for (int64_t d = 0; d < of.size; d += 2) {
          const __m512bh rows = (__m512bh)_mm512_loadu_si512(&pairs[d / 2 * of.lanes() + lane]);
          for (int64_t j = 0; j < AT_ONCE; ++j) {
            int32_t pair;
            std::memcpy(&pair, keys[j] + d, 4);
            sum[j] = _mm512_dpbf16_ps(sum[j], rows, (__m512bh)_mm512_set1_epi32(pair));
          }
        }
        for (int64_t j = 0; j < AT_ONCE; ++j) _mm512_storeu_ps(scores + (k + j) * of.lanes() + lane, sum[j]);
      }
    }
  }
};
#endif

template <class Scalar>
struct Head {
  const Scalar *query, *key, *value, *mask;  // mask may be null
  int64_t key_stride, value_stride, mask_stride;

  // Have memory deliver what is read soon, while something else is computed.
  static void fetch(const Scalar* from, int64_t stride, int64_t count, const Sizes& of) {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t d = 0; d < of.size; d += 64 / int64_t(sizeof(Scalar))) __builtin_prefetch(from + k * stride + d);
  }

  // Attend to keys first .. last - 1.
  void attend(const Sizes& of, int64_t first, int64_t last, float scale, Found& found) const {
    const Queries<Scalar> queries(query, of);
    std::vector<float> wide(BLOCK * of.width()), scores(BLOCK * of.lanes());
    for (int64_t start = first; start < last; start += BLOCK) {
      const int64_t count = std::min(BLOCK, last - start);
      fetch(value + start * value_stride, value_stride, count, of);
      queries.multiply(key + start * key_stride, key_stride, count, scores.data());
      for (int64_t k = 0; k < count * of.lanes(); k += LANES) at(&scores[k]) *= scale * LOG2_E;
      if (mask) hide(of, start, count, scores.data());
      weigh(of, count, scores.data(), found);
      const Rows values = widen(value + start * value_stride, value_stride, count, of.size, of.width(), wide.data());
      fetch(key + (start + count) * key_stride, key_stride, std::min(BLOCK, last - start - count), of);
      gather(of, count, scores.data(), values, found.sums.data());
    }
  }

  void hide(const Sizes& of, int64_t start, int64_t count, float* scores) const {
    const int64_t visible = of.keys - of.masked;
    for (int64_t r = 0; r < of.rows; ++r)
      for (int64_t k = std::max<int64_t>(0, visible - start); k < count; ++k)
        scores[k * of.lanes() + r] += widened(mask[r * mask_stride + start + k - visible]) * LOG2_E;
  }

  // Scores become weights; what was found before is scaled to the new largest score.
  static void weigh(const Sizes& of, int64_t count, float* scores, Found& found) {
    const int64_t lanes = of.lanes();
    std::vector<float> smaller(lanes);
    for (int64_t lane = 0; lane < lanes; lane += LANES) {
      const Vector before = at(&found.largest[lane]);
      Vector most = before, sum = {};
      for (int64_t k = 0; k < count; ++k) most = larger(most, at(scores + k * lanes + lane));
      for (int64_t k = 0; k < count; ++k) {
        Vector& score = at(scores + k * lanes + lane);
        score = exp2(score - most);
        sum += score;
      }
      const Vector factor = exp2(before - most);
      at(&found.largest[lane]) = most;
      at(&found.weights[lane]) = at(&found.weights[lane]) * factor + sum;
      at(&smaller[lane]) = factor;
    }
    for (int64_t r = 0; r < of.rows; ++r)
      for (int64_t d = 0; d < of.width(); d += LANES) at(&found.sums[r * of.width() + d]) *= smaller[r];
  }

  static void gather(const Sizes& of, int64_t count, const float* weights, Rows values, float* sums) {
    const int64_t lanes = of.lanes(), width = of.width();
    for (int64_t r = 0; r < of.rows; r += 4)  // lanes behind the last row weigh something, and are not used
      for (int64_t d = 0; d < width; d += 2 * LANES) {
        Vector sum[4][2];
        for (int64_t i = 0; i < 4; ++i)
          for (int64_t j = 0; j < 2; ++j) sum[i][j] = at(sums + (r + i) * width + d + j * LANES);
        for (int64_t k = 0; k < count; ++k)
          for (int64_t i = 0; i < 4; ++i)
            for (int64_t j = 0; j < 2; ++j)
              sum[i][j] += vector(values[k] + d + j * LANES) * weights[k * lanes + r + i];
        for (int64_t i = 0; i < 4; ++i)
          for (int64_t j = 0; j < 2; ++j) at(sums + (r + i) * width + d + j * LANES) = sum[i][j];
      }
  }
};

// Write what was found of all parts of the keys.
template <class Scalar>
void merge(const Sizes& of, const Found* parts, int64_t count, Scalar* to) {
  for (int64_t r = 0; r < of.rows; ++r) {
    float most = LOWEST, total = 0;
    for (int64_t part = 0; part < count; ++part) most = std::max(most, parts[part].largest[r]);
    std::vector<float> sums(of.size);
    for (int64_t part = 0; part < count; ++part) {
      const float factor = exp2(Vector{} + (parts[part].largest[r] - most))[0];
      total += factor * parts[part].weights[r];
      for (int64_t d = 0; d < of.size; ++d) sums[d] += factor * parts[part].sums[r * of.width() + d];
    }
    for (int64_t d = 0; d < of.size; ++d) narrowed(total != 0 ? sums[d] / total : 0.0f, to[r * of.size + d]);
  }
}

template <class Scalar>
void attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask, double scale, Tensor& to) {
  const Sizes of{query.size(2), key.size(2), query.size(3), mask.size(3)};
  const int64_t heads = query.size(1), pieces = (of.rows + MOST_ROWS - 1) / MOST_ROWS;
  const int64_t tasks = query.size(0) * heads * pieces, threads = torch::stable::get_num_threads();
  const int64_t parts = std::max<int64_t>(1, std::min(threads / tasks, of.keys / LEAST_KEYS));
  const int64_t each = padded((of.keys + parts - 1) / parts, BLOCK);
  const auto pointer = [](const Tensor& tensor) { return static_cast<const Scalar*>(tensor.const_data_ptr()); };
  const auto rows_of = [&](int64_t task) {
    return Sizes{std::min(MOST_ROWS, of.rows - task % pieces * MOST_ROWS), of.keys, of.size, of.masked};
  };
  std::vector<Found> found;
  for (int64_t task = 0; task < tasks; ++task) found.insert(found.end(), parts, Found(rows_of(task)));
  torch::stable::parallel_for(0, tasks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t task = number / parts, first = number % parts * each, skipped = task % pieces * MOST_ROWS;
      const int64_t batch = task / pieces / heads, head = task / pieces % heads;
      const auto part = [&](const Tensor& of) { return pointer(of) + batch * of.stride(0) + head * of.stride(1); };
      const int64_t mask_stride = mask.size(2) > 1 ? mask.stride(2) : 0;
      const Scalar* hidden = mask.numel() ? pointer(mask) + (mask.size(0) > 1 ? batch * mask.stride(0) : 0) : nullptr;
      const Head<Scalar> one{part(query) + skipped * of.size,
                             part(key),
                             part(value),
                             hidden ? hidden + skipped * mask_stride : nullptr,
                             key.stride(2),
                             value.stride(2),
                             mask_stride};
      one.attend(rows_of(task), first, std::min(first + each, of.keys), scale, found[number]);
    }
  });
  auto* out = static_cast<Scalar*>(to.mutable_data_ptr());
  for (int64_t task = 0; task < tasks; ++task) {
    merge(rows_of(task), &found[task * parts], parts, out);
    out += rows_of(task).rows * of.size;
  }
}

Tensor narrow_attention(Tensor query, Tensor key, Tensor value, Tensor mask, double scale) {
  const bool whole = query.is_contiguous() && mask.is_contiguous() && key.stride(3) == 1 && value.stride(3) == 1;
  for (const Tensor& each : {key, value, mask})
    STD_TORCH_CHECK(each.scalar_type() == query.scalar_type(), "queries, keys, values and masks must be of one type");
  STD_TORCH_CHECK(whole, "queries and masks must be contiguous, keys and values each in one piece");
  Tensor to = torch::stable::new_empty(query, query.sizes());
  if (query.scalar_type() == torch::headeronly::ScalarType::BFloat16)
    attend<uint16_t>(query, key, value, mask, scale, to);
  else
    attend<float>(query, key, value, mask, scale, to);
  return to;
}

STABLE_TORCH_LIBRARY_FRAGMENT(drafttrain, library) {
  library.def("narrow_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(drafttrain, CPU, library) { library.impl("narrow_attention", TORCH_BOX(&narrow_attention)); }

}  // namespace
