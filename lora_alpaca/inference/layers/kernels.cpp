// A step of a Llama-like decoder for a few tokens: every weight is read once, at the width that it is stored in.
//
// Plain C structures come in, whose memory belongs to the caller; layers/decoder.py describes them again for ctypes.
// Activations are fp32. Vectors are those of GCC and Clang, which make of them what the processor has.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <sched.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

const int AHEAD = 16384; // bytes that are asked for beforehand; the processor guesses badly where rows are short

enum Kind : int64_t { F32, BF16, INT8, NF4, PAIRS }; // the last: bf16 times bf16, where the processor can

struct Matrix {          // [rows, columns], row after row
    int64_t kind, rows, columns;
    const void *values;  // NF4: two values a byte, the first in the upper half
    const float *scales; // INT8: [rows]; NF4: of 64 values each, then the 16 values of the code
    const float *bias;   // [rows], or null
};

struct Linear {
    Matrix weight, a, b; // y = weight x + b (a x); `a` without rows is none
};

struct Layer {
    Linear q, k, v, o, gate, up, down;
    const float *norm_in, *norm_mlp, *norm_q, *norm_k; // the last two may be null
    int64_t window;                                    // tokens that are seen, 0 for all
};

struct Model {
    int64_t layers, width, heads, groups, head_size, inner;
    float epsilon, scaling;
    const Layer *layer;
    Matrix embeddings;
    Linear head;
    const float *norm;
};

struct Step {                        // N tokens, of which `kept` get logits
    int64_t tokens, kept, threads, length, is_bf16; // the cache is [rows, groups, length, head_size], fp32 or bf16
    const int64_t *ids, *rows, *positions, *turns, *keep; // `turns` are the rows of `cosines` and `sines`
    const float *cosines, *sines;    // [, head_size]
    void *const *keys, *const *values; // the cache of every layer
    float *memory;                   // `memory_needed` floats
    float *logits;                   // [kept, vocabulary]
};

typedef float f16v __attribute__((vector_size(64)));
typedef float f8v __attribute__((vector_size(32)));
typedef float f4v __attribute__((vector_size(16)));
typedef int32_t i16v __attribute__((vector_size(64)));
typedef uint32_t u16v __attribute__((vector_size(64)));
typedef uint16_t s16v __attribute__((vector_size(32)));
typedef int8_t b16v __attribute__((vector_size(16)));
typedef uint8_t ub16v __attribute__((vector_size(16)));
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define EACH(i, count) _Pragma("unroll") for (int i = 0; i < count; i++)
#else
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < count; i++)
#endif

template <class V, class T> INLINE V load(const T *from) {
    V value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE float sum(f16v v) {
    f8v halves[2];
    memcpy(halves, &v, sizeof v);
    f8v half = halves[0] + halves[1];
    f4v quarters[2];
    memcpy(quarters, &half, sizeof half);
    f4v quarter = quarters[0] + quarters[1];
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// 16 numbers made wider; compilers make of a plain conversion one that is several times slower
INLINE f16v from_bf16(const uint16_t *at) {
#ifdef __AVX512F__
    return (f16v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(at)), 16);
#elif defined(__AVX2__)
    __m256i halves[2];
    for (int i = 0; i < 2; i++) halves[i] = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(at + 8 * i)), 16);
    return load<f16v>(halves);
#else
    return (f16v)(__builtin_convertvector(load<s16v>(at), u16v) << 16);
#endif
}

INLINE f16v from_int8(const int8_t *at) {
#ifdef __AVX512F__
    return (f16v)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(at)));
#elif defined(__AVX2__)
    __m256 halves[2];
    for (int i = 0; i < 2; i++)
        halves[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(at + 8 * i))));
    return load<f16v>(halves);
#else
    return __builtin_convertvector(__builtin_convertvector(load<b16v>(at), i16v), f16v);
#endif
}

INLINE i16v from_bytes(const uint8_t *at) {
#ifdef __AVX512F__
    return (i16v)_mm512_cvtepu8_epi32(load<__m128i>(at));
#elif defined(__AVX2__)
    __m256i halves[2];
    for (int i = 0; i < 2; i++) halves[i] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(at + 8 * i)));
    return load<i16v>(halves);
#else
    return __builtin_convertvector(load<ub16v>(at), i16v);
#endif
}

INLINE f16v looked_up(f16v code, i16v places) {
#ifdef __AVX512F__
    return (f16v)_mm512_permutexvar_ps((__m512i)places, (__m512)code);
#elif defined(__AVX2__)
    __m256 codes[2], found[2];
    __m256i where[2];
    memcpy(codes, &code, sizeof code), memcpy(where, &places, sizeof places);
    for (int i = 0; i < 2; i++) {
        __m256 low = _mm256_permutevar8x32_ps(codes[0], where[i]), high = _mm256_permutevar8x32_ps(codes[1], where[i]);
        found[i] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(where[i], 28)));
    }
    return load<f16v>(found);
#else
    f16v found;
    for (int i = 0; i < 16; i++) found[i] = code[places[i]];
    return found;
#endif
}

INLINE uint16_t as_bf16(float value) { // rounded to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE float one_from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

// Where threads wait for each other. One that waits longer than a moment gives its core to whoever needs it, perhaps
// the thread that it waits for: OpenMP's own barrier would spin on, and a busy machine then takes ten times as long.
struct Barrier {
    std::atomic<int> arrived{0}, round{0};
    void wait() {
        const int now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++)
            if (spins > 4000) sched_yield();
    }
};

// ------------------------------------------------------------------------------------------------------ products

template <int64_t KIND> INLINE f16v values_at(const void *row, int64_t column) {
    if (KIND == F32) return load<f16v>((const float *)row + column);
    if (KIND == BF16) return from_bf16((const uint16_t *)row + column);
    return from_int8((const int8_t *)row + column);
}

// R rows from `row` on times T tokens; `x` is as `prepared` returns it. The loops over rows
// and tokens are unrolled, or the sums would not stay in registers.
template <int64_t KIND, int R, int T>
INLINE void block(const Matrix &w, int64_t row, const float *x, float (&found)[R][T]) {
    const int64_t columns = w.columns;
    f16v sums[R][T] = {};
    if constexpr (KIND == NF4) {
        const f16v code = load<f16v>(w.scales + w.rows * columns / 64);
        for (int64_t c = 0; c < columns; c += 64) {
            EACH(r, R) {
                const int64_t place = (row + r) * columns + c;
                const uint8_t *bytes = (const uint8_t *)w.values + place / 2;
                const i16v first = from_bytes(bytes), second = from_bytes(bytes + 16);
                __builtin_prefetch(bytes + AHEAD);
                const f16v even = looked_up(code, first >> 4), odd = looked_up(code, first & 15);
                const f16v even2 = looked_up(code, second >> 4), odd2 = looked_up(code, second & 15);
                const float scale = w.scales[place / 64];
                EACH(t, T) {
                    const float *at = x + t * columns + c;
                    f16v part = even * load<f16v>(at) + odd * load<f16v>(at + 16);
                    part += even2 * load<f16v>(at + 32) + odd2 * load<f16v>(at + 48);
                    sums[r][t] += scale * part;
                }
            }
        }
#ifdef __AVX512BF16__
    } else if constexpr (KIND == PAIRS) {
        const uint16_t *begin = (const uint16_t *)w.values + row * columns;
        for (int64_t c = 0; c < columns; c += 32) {
            __m512bh at[T];
            EACH(t, T) at[t] = load<__m512bh>((const uint16_t *)(x + t * columns) + c);
            EACH(r, R) {
                __builtin_prefetch((const char *)(begin + r * columns + c) + AHEAD);
                const __m512bh values = load<__m512bh>(begin + r * columns + c);
                EACH(t, T) sums[r][t] = (f16v)_mm512_dpbf16_ps((__m512)sums[r][t], values, at[t]);
            }
        }
#endif
    } else {
        const int64_t size = KIND == F32 ? 4 : KIND == BF16 ? 2 : 1;
        const char *begin = (const char *)w.values + row * columns * size;
        for (int64_t c = 0; c < columns; c += 16) {
            f16v at[T];
            EACH(t, T) at[t] = load<f16v>(x + t * columns + c);
            EACH(r, R) {
                __builtin_prefetch(begin + r * columns * size + c * size + AHEAD);
                const f16v values = values_at<KIND>(begin + r * columns * size, c);
                EACH(t, T) sums[r][t] += values * at[t];
            }
        }
    }
    EACH(r, R) EACH(t, T) {
        float total = sum(sums[r][t]);
        if (KIND == INT8) total *= w.scales[row + r];
        found[r][t] = total + (w.bias ? w.bias[row + r] : 0);
    }
}

template <int64_t KIND, int R, int T>
INLINE void store(const Matrix &w, int64_t row, const float *x, float *y, int64_t stride, bool adds) {
    float found[R][T];
    block<KIND, R, T>(w, row, x, found);
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) y[t * stride + row + r] = found[r][t] + (adds ? y[t * stride + row + r] : 0);
}

template <int64_t KIND, int R>
INLINE void store_all(const Matrix &w, int64_t row, const float *x, int64_t tokens, float *y, int64_t stride,
                      bool adds) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) store<KIND, R, 4>(w, row, x + t * w.columns, y + t * stride, stride, adds);
    for (; t + 2 <= tokens; t += 2) store<KIND, R, 2>(w, row, x + t * w.columns, y + t * stride, stride, adds);
    for (; t < tokens; t++) store<KIND, R, 1>(w, row, x + t * w.columns, y + t * stride, stride, adds);
}

// y [tokens, stride]: rows `first` to `last` of w x, added to what is there if `adds`
template <int64_t KIND>
static void product(const Matrix &w, int64_t first, int64_t last, const float *x, int64_t tokens, float *y,
                    int64_t stride, bool adds) {
    int64_t row = first;
    for (; row + 4 <= last; row += 4) store_all<KIND, 4>(w, row, x, tokens, y, stride, adds);
    for (; row < last; row++) store_all<KIND, 1>(w, row, x, tokens, y, stride, adds);
}

// how a product is computed
static Kind way(const Matrix &w) {
#ifdef __AVX512BF16__
    if (w.kind == BF16 && w.columns % 32 == 0) return PAIRS;
#endif
    return (Kind)w.kind;
}

// `x` [tokens, columns] as a product takes it: for NF4, of 32 neighbours the even ones first; for pairs, in bf16
static const float *prepared(Kind kind, const float *x, int64_t tokens, int64_t columns, float *memory) {
    if (kind == NF4)
        for (int64_t c = 0; c < tokens * columns; c += 32)
            for (int i = 0; i < 16; i++) memory[c + i] = x[c + 2 * i], memory[c + 16 + i] = x[c + 2 * i + 1];
    if (kind == PAIRS)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t c = 0; c < columns; c++)
                ((uint16_t *)(memory + t * columns))[c] = as_bf16(x[t * columns + c]);
    return kind == NF4 || kind == PAIRS ? memory : x;
}

static void product(Kind kind, const Matrix &w, int64_t first, int64_t last, const float *x, int64_t tokens, float *y,
                    int64_t stride, bool adds) {
    switch (kind) {
    case F32: return product<F32>(w, first, last, x, tokens, y, stride, adds);
    case BF16: return product<BF16>(w, first, last, x, tokens, y, stride, adds);
    case INT8: return product<INT8>(w, first, last, x, tokens, y, stride, adds);
    case NF4: return product<NF4>(w, first, last, x, tokens, y, stride, adds);
    case PAIRS: return product<PAIRS>(w, first, last, x, tokens, y, stride, adds);
    }
}

INLINE void share(int64_t size, int64_t unit, int64_t &first, int64_t &last) { // of this thread
    int64_t units = (size + unit - 1) / unit, threads = omp_get_num_threads(), me = omp_get_thread_num();
    first = unit * (units * me / threads);
    last = unit * (units * (me + 1) / threads);
    if (last > size) last = size;
}

// The part of this thread of several linear layers with the same input, and memory `low` for the products with `a`.
// `y[i]` is [tokens, stride[i]]; every thread has `memory` of its own for the input in another form.
template <int COUNT>
static void linear(Barrier &barrier, const Linear *const (&layers)[COUNT], const float *x, float *memory,
                   int64_t tokens, float *low, float *const (&y)[COUNT], const int64_t (&stride)[COUNT],
                   bool adds = false) {
    int64_t total = 0, ranks = 0, first, last;
    for (auto layer : layers) total += layer->weight.rows, ranks += layer->a.rows;
    const Kind kind = way(layers[0]->weight); // that of all
    const float *const own = prepared(kind, x, tokens, layers[0]->weight.columns, memory);
    if (ranks) {
        float *to = low;
        for (auto layer : layers) {
            share(layer->a.rows, 1, first, last);
            product((Kind)layer->a.kind, layer->a, first, last, x, tokens, to, layer->a.rows, false);
            to += tokens * layer->a.rows;
        }
        barrier.wait();
    }
    share(total, 4, first, last);
    for (int i = 0; i < COUNT; i++) {
        const Linear &layer = *layers[i];
        int64_t rows = layer.weight.rows, from = first < 0 ? 0 : first, to = last < rows ? last : rows;
        if (from < to) {
            product(kind, layer.weight, from, to, own, tokens, y[i], stride[i], adds);
            if (layer.a.rows) product((Kind)layer.b.kind, layer.b, from, to, low, tokens, y[i], stride[i], true);
        }
        first -= rows, last -= rows;
        low += tokens * layer.a.rows;
    }
}

// ------------------------------------------------------------------------------------------------------ the layers

static void normed(const float *x, int64_t tokens, int64_t width, const float *weight, float epsilon, float *y) {
    for (int64_t t = 0; t < tokens; t++, x += width, y += width) {
        f16v squares = {};
        for (int64_t c = 0; c < width; c += 16) {
            f16v values = load<f16v>(x + c);
            squares += values * values;
        }
        const float scale = 1 / std::sqrt(sum(squares) / width + epsilon);
        for (int64_t c = 0; c < width; c++) y[c] = weight[c] * (x[c] * scale);
    }
}

static void rotated(float *x, int64_t size, const float *cosines, const float *sines) {
    for (int64_t i = 0; i < size / 2; i++) {
        float one = x[i], other = x[i + size / 2];
        x[i] = one * cosines[i] - other * sines[i];
        x[i + size / 2] = other * cosines[i + size / 2] + one * sines[i + size / 2];
    }
}

template <class T> INLINE f16v cached(const T *at) {
    if constexpr (sizeof(T) == 4) return load<f16v>(at);
    else return from_bf16(at);
}

// one query with the keys and values [tokens, size] that it sees
template <class T>
static void attend(const float *query, const T *keys, const T *values, int64_t tokens, int64_t size, float scaling,
                   float *scores, float *output) {
    float most = -INFINITY, total = 0;
    for (int64_t t = 0; t < tokens; t++) {
        f16v sums = {};
        for (int64_t c = 0; c < size; c += 16) sums += load<f16v>(query + c) * cached(keys + t * size + c);
        scores[t] = scaling * sum(sums);
        if (scores[t] > most) most = scores[t];
    }
    memset(output, 0, size * sizeof(float));
    for (int64_t t = 0; t < tokens; t++) {
        const float weight = std::exp(scores[t] - most);
        total += weight;
        for (int64_t c = 0; c < size; c += 16) {
            f16v sums = load<f16v>(output + c) + weight * cached(values + t * size + c);
            memcpy(output + c, &sums, sizeof sums);
        }
    }
    for (int64_t c = 0; c < size; c++) output[c] /= total;
}

struct Sizes { // of the memory of a step, in floats
    int64_t hidden, qkv, mixed, inner, low, own;
    Sizes(const Model &m, const Step &s) {
        int64_t ranks = 0, widest = m.width > m.inner ? m.width : m.inner;
        if (m.heads * m.head_size > widest) widest = m.heads * m.head_size;
        auto most = [&](int64_t rank) { if (rank > ranks) ranks = rank; };
        for (int64_t i = 0; i < m.layers; i++) {
            const Layer &l = m.layer[i];
            most(l.q.a.rows + l.k.a.rows + l.v.a.rows), most(l.o.a.rows), most(l.gate.a.rows + l.up.a.rows);
            most(l.down.a.rows);
        }
        most(m.head.a.rows);
        hidden = s.tokens * m.width;
        qkv = s.tokens * (m.heads + 2 * m.groups) * m.head_size;
        mixed = s.tokens * m.heads * m.head_size;
        inner = 2 * s.tokens * m.inner;
        low = s.tokens * ranks;
        own = s.length + 2 * s.tokens * widest; // of each thread: scores, an input, and its other form
    }
    int64_t all(int64_t threads) const { return 2 * hidden + qkv + mixed + inner + low + threads * own; }
};

extern "C" int64_t memory_needed(const Model *model, const Step *step) {
    return Sizes(*model, *step).all(step->threads);
}

template <class T> static void attention(Barrier &barrier, const Model &m, const Step &s, int64_t number, float *qkv, float *mixed,
                                         float *scores) {
    const Layer &layer = m.layer[number];
    const int64_t size = m.head_size, all = m.heads + 2 * m.groups;
    T *keys = (T *)s.keys[number], *values = (T *)s.values[number];
    int64_t first, last;
    share(s.tokens * all, 1, first, last);
    for (int64_t task = first; task < last; task++) { // a head of a token: turned, and keys and values cached
        const int64_t t = task / all, head = task % all;
        float *x = qkv + task * size;
        const float *norm = head < m.heads ? layer.norm_q : layer.norm_k;
        if (head < m.heads + m.groups) {
            if (norm) normed(x, 1, size, norm, m.epsilon, x);
            rotated(x, size, s.cosines + s.turns[t] * size, s.sines + s.turns[t] * size);
        }
        if (head >= m.heads) {
            const int64_t group = (head - m.heads) % m.groups;
            T *to = (head < m.heads + m.groups ? keys : values) +
                    ((s.rows[t] * m.groups + group) * s.length + s.positions[t]) * size;
            for (int64_t c = 0; c < size; c++)
                if constexpr (sizeof(T) == 4) to[c] = x[c];
                else to[c] = as_bf16(x[c]);
        }
    }
    barrier.wait();
    share(s.tokens * m.heads, 1, first, last);
    for (int64_t task = first; task < last; task++) {
        const int64_t t = task / m.heads, head = task % m.heads, seen = s.positions[t] + 1;
        const int64_t from = layer.window && seen > layer.window ? seen - layer.window : 0;
        const int64_t begin = ((s.rows[t] * m.groups + head * m.groups / m.heads) * s.length + from) * size;
        attend(qkv + (t * all + head) * size, keys + begin, values + begin, seen - from, size, m.scaling, scores,
               mixed + task * size);
    }
}

extern "C" void decode(const Model *model, const Step *step) {
    const Model &m = *model;
    const Step &s = *step;
    const Sizes sizes(m, s);
    const int64_t N = s.tokens, all = (m.heads + 2 * m.groups) * m.head_size;
    float *hidden = s.memory, *kept = hidden + sizes.hidden, *qkv = kept + sizes.hidden, *mixed = qkv + sizes.qkv;
    float *gate = mixed + sizes.mixed, *up = gate + N * m.inner, *low = up + N * m.inner, *own = low + sizes.low;
    Barrier barrier;
#pragma omp parallel num_threads((int)s.threads)
    {
        float *scores = own + omp_get_thread_num() * sizes.own, *x = scores + s.length;
        float *form = x + (sizes.own - s.length) / 2;
        int64_t first, last;
        share(N, 1, first, last);
        for (int64_t t = first; t < last; t++)
            for (int64_t c = 0; c < m.width; c++)
                hidden[t * m.width + c] = m.embeddings.kind == F32
                    ? ((const float *)m.embeddings.values)[s.ids[t] * m.width + c]
                    : one_from_bf16(((const uint16_t *)m.embeddings.values)[s.ids[t] * m.width + c]);
        barrier.wait();
        for (int64_t number = 0; number < m.layers; number++) {
            const Layer &layer = m.layer[number];
            normed(hidden, N, m.width, layer.norm_in, m.epsilon, x);
            linear<3>(barrier, {&layer.q, &layer.k, &layer.v}, x, form, N, low,
                      {qkv, qkv + m.heads * m.head_size, qkv + (m.heads + m.groups) * m.head_size}, {all, all, all});
            barrier.wait();
            if (s.is_bf16) attention<uint16_t>(barrier, m, s, number, qkv, mixed, scores);
            else attention<float>(barrier, m, s, number, qkv, mixed, scores);
            barrier.wait();
            linear<1>(barrier, {&layer.o}, mixed, form, N, low, {hidden}, {m.width}, true);
            barrier.wait();
            normed(hidden, N, m.width, layer.norm_mlp, m.epsilon, x);
            linear<2>(barrier, {&layer.gate, &layer.up}, x, form, N, low, {gate, up}, {m.inner, m.inner});
            barrier.wait();
            share(N * m.inner, 16, first, last);
            for (int64_t i = first; i < last; i++) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
            barrier.wait();
            linear<1>(barrier, {&layer.down}, gate, form, N, low, {hidden}, {m.width}, true);
            barrier.wait();
        }
        share(s.kept, 1, first, last);
        for (int64_t t = first; t < last; t++)
            normed(hidden + s.keep[t] * m.width, 1, m.width, m.norm, m.epsilon, kept + t * m.width);
        barrier.wait();
        linear<1>(barrier, {&m.head}, kept, form, s.kept, low, {s.logits}, {m.head.weight.rows});
        barrier.wait(); // not at the end of the parallel part, which is OpenMP's
    }
}

// y [tokens, rows] of one linear layer; `memory` is tokens * (rows of `a` + threads * columns) floats
extern "C" void multiply(const Linear *layer, const float *x, int64_t tokens, int64_t threads, float *memory, float *y) {
    Barrier barrier;
#pragma omp parallel num_threads((int)threads)
    {
        float *form = memory + tokens * (layer->a.rows + omp_get_thread_num() * layer->weight.columns);
        linear<1>(barrier, {layer}, x, form, tokens, memory, {y}, {layer->weight.rows});
        barrier.wait();
    }
}
