// Decoder layers and heads over the kernels of the instruction set in use.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <chrono>
#include <memory>
#include <mutex>
#include <new>
#include "kernels.h"
#include "pool.h"

namespace {
// ---- memory that is kept between calls

template <class T> class Buffer {  // grows; begins at 64 bytes
  public:
    T *of(size_t count) {
        if (count > held) {
            free(at);
            at = nullptr;
            held = 0;
            void *found = nullptr;
            if (posix_memalign(&found, 64, (count * sizeof(T) + 4095) / 4096 * 4096) != 0) throw std::bad_alloc();
            at = (T *)found;
            held = count;
        }
        return at;
    }
    Buffer() = default;
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    Buffer(Buffer &&other) noexcept : at(other.at), held(other.held) { other.at = nullptr, other.held = 0; }
    ~Buffer() { free(at); }

  private:
    T *at = nullptr;
    size_t held = 0;
};

class Activations : public Acts {
  public:
    void shape(int rows, int cols, int of_digits) {
        M = rows, K = cols, digits = of_digits;
        x = x_held.of((size_t)M * K);
        q = q_held.of((size_t)M * K * 2);
        d = d_held.of((size_t)M * K / 32);
        s = s_held.of((size_t)M * K / 16);
    }
    // n values of row m from column `from` on (a multiple of 32), which lie in x; `grid`: they meet one
    void take(bool grid, int m, int from, int n) {
        if (!grid) return;
        const int64_t group = (int64_t)(from / 32) * M + m;
        kernels().quantise(x + (size_t)m * K + from, n, M, digits, q + 32 * digits * group, d + group, s + 2 * group);
    }

  private:
    Buffer<float> x_held, d_held, s_held;
    Buffer<int8_t> q_held;
};

struct Scratch {  // of one thread
    Activations rows;  // what it normed itself
    int64_t stamp = -1;
    Buffer<float> scores, tile;
};

struct Team {
    std::mutex mutex;
    std::unique_ptr<Pool> pool;
    std::vector<Scratch> scratch;
    Activations shared, heads, inner;
    Buffer<float> qkv, stream, features;
    int threads = 0;
    int64_t stamp = 0;

    Pool &ready() {
        if (!pool) pool = std::make_unique<Pool>(threads > 0 ? threads : (int)std::thread::hardware_concurrency() > 0 ? (int)std::thread::hardware_concurrency() : 1);
        if ((int)scratch.size() < pool->size) scratch = std::vector<Scratch>(pool->size);
        return *pool;
    }
};
Team *team = new Team;  // never destroyed: threads may outlive the end of the program

constexpr int OWN_ROWS = 4;    // up to which each thread norms the rows itself, which saves waiting for others
constexpr int QUERIES = 64;    // that attend together
constexpr int PHASES = 10;     // of a layer

// Rows, normed (or as they are), for the matrices that read them: made by each thread for itself, or once for all.
struct Normed {
    const float *from, *weight;
    bool norms, grid;
    float eps;
    int rows, cols, digits;
    int64_t stamp;

    bool own() const { return rows <= OWN_ROWS; }
    void one(Activations &to, int m) const {
        float *at = to.x + (size_t)m * cols;
        if (norms) kernels().norm(from + (size_t)m * cols, weight, cols, eps, at);
        else memcpy(at, from + (size_t)m * cols, sizeof(float) * cols);
        to.take(grid, m, 0, cols);
    }
    void share(Team &t, Worker &worker) const {  // before the phase that reads them
        if (own()) return;
        worker.each(rows, [&](int m) { one(t.shared, m); });
    }
    const Acts &get(Team &t, int thread) const {  // within a chunk of that phase
        if (!own()) return t.shared;
        Scratch &mine = t.scratch[thread];
        if (mine.stamp != stamp) {
            mine.rows.shape(rows, cols, digits);
            for (int m = 0; m < rows; m++) one(mine.rows, m);
            mine.stamp = stamp;
        }
        return mine.rows;
    }
};

// ---- what is refused

bool is_wrong(const Matrix &w, int cols, int digits) {
    if (w.digits != digits || w.data == nullptr || w.cols != cols || w.rows <= 0 || w.rows % 32 || w.cols <= 0 || w.cols % 32)
        return true;
    if (w.format < 0 || w.format >= FORMATS || w.digits < 1 || w.digits > 2 || (uintptr_t)w.data % 64) return true;
    if (w.stride % 64 || stride_of(w) < pair_bytes(w.format, w.cols)) return true;
    return (w.format == FORMAT_K4 || w.format == FORMAT_K6) && w.cols % 256;
}

int check(const Shape &s, const Layer *layers, int count, int part, const Batch &b) {
    const int dims[] = {32, 64, 96, 128, 160, 192, 256};
    bool known = false;
    for (int dim : dims) known = known || dim == s.head_dim;
    if (!known || s.heads <= 0 || s.kv_heads <= 0 || s.heads % s.kv_heads || s.heads / s.kv_heads > QUERIES || s.hidden <= 0 ||
        s.hidden % 32 || s.inner <= 0 || s.inner % 32 || count <= 0 || part < PART_ALL || part > PART_MLP)
        return BAD_SHAPE;
    const int digits = part == PART_MLP ? layers->gate.digits : layers->queries.digits;  // of all that share activations
    for (int i = 0; i < count; i++) {
        const Layer &l = layers[i];
        if (part != PART_MLP) {
            if (is_wrong(l.queries, s.hidden, digits) || l.queries.rows != s.heads * s.head_dim ||
                is_wrong(l.keys, s.hidden, digits) || l.keys.rows != s.kv_heads * s.head_dim ||
                is_wrong(l.values, s.hidden, digits) || l.values.rows != s.kv_heads * s.head_dim ||
                is_wrong(l.out, s.heads * s.head_dim, digits) || l.out.rows != s.hidden)
                return BAD_MATRIX;
            if (l.cache == nullptr || l.group < 0 || l.group >= b.groups || l.window < 0 || l.rotation < -1 || l.rotation > 1 ||
                (l.rotation >= 0 && (l.rotary < 2 || l.rotary % 2 || l.rotary > s.head_dim)) ||
                l.qk_norm < QK_PLAIN || l.qk_norm > QK_NORM_FULL)
                return BAD_SHAPE;
            if (b.blocks == nullptr || (l.rotation >= 0 && b.rotations == nullptr)) return BAD_BATCH;
        }
        if (part != PART_ATTENTION && (l.activation < SILU || l.activation > GELU)) return BAD_SHAPE;
        if (part != PART_ATTENTION && (is_wrong(l.gate, s.hidden, digits) || l.gate.rows != s.inner ||
                                       is_wrong(l.up, s.hidden, digits) || l.up.rows != s.inner ||
                                       is_wrong(l.down, s.inner, digits) || l.down.rows != s.hidden))
            return BAD_MATRIX;
    }
    if (b.rows <= 0 || b.parts <= 0 || b.block_size <= 0 || b.width <= 0 || b.groups <= 0 ||
        b.starts == nullptr || b.counts == nullptr || b.variants == nullptr)
        return BAD_BATCH;
    int64_t rows = 0;
    for (int i = 0; i < b.parts; i++) {
        const int64_t last = (int64_t)b.starts[i] + b.counts[i] - 1;
        if (b.starts[i] < 0 || b.counts[i] <= 0 || last >= (int64_t)b.width * b.block_size || last >= b.positions) return BAD_BATCH;
        if (b.variants[i] < 0 || b.variants[i] > 1) return BAD_BATCH;
        rows += b.counts[i];
        for (int j = 0; part != PART_MLP && j < count; j++) {
            const Layer &l = layers[j];
            const int first = l.window && b.starts[i] >= l.window ? b.starts[i] - l.window + 1 : 0;
            const int32_t *blocks = b.blocks + ((int64_t)l.group * b.parts + i) * b.width;
            for (int block = first / b.block_size; block <= last / b.block_size; block++)
                if (blocks[block] < 0 || ((int64_t)blocks[block] + 1) * b.block_size > l.slots) return BAD_BATCH;
        }
    }
    return rows == b.rows ? OK : BAD_BATCH;
}

// ---- layers

struct Row {
    int part, position;
};

struct Call {  // everything that a thread reads between phases
    Shape shape;
    std::vector<Layer> layers;
    std::vector<Row> rows;
    std::vector<int> first_row;  // of each part
    Batch batch;
    int part;
    float *hidden, *residual, *qkv, *stream;
    int64_t stamp;
};

struct Query {  // that attend together: of one part and one key head
    int part, head, from, to;  // from and to count queries: row * heads of the group + which of them
};

void project(Team &t, Worker &worker, const Call &c, const Layer &l, int64_t stamp) {
    const Shape &s = c.shape;
    const int H = s.heads, Hkv = s.kv_heads, Dh = s.head_dim, N = (H + 2 * Hkv) * Dh, M = (int)c.rows.size();
    float *qkv = c.qkv;
    const auto finish = [&](int h, int m) {  // norm, rotate, keep
        float *head = qkv + (size_t)m * N + h * Dh;
        const Row &row = c.rows[m];
        if (h < H + Hkv) {
            if (l.qk_norm == QK_NORM_HEAD) kernels().norm(head, h < H ? l.norm_queries : l.norm_keys, Dh, s.eps, head);
            if (l.rotation >= 0)
                kernels().rotate(head, c.batch.rotations[2 * c.batch.variants[row.part] + l.rotation] + (size_t)row.position * l.rotary, l.rotary);
        }
        if (h < H) return;
        const int32_t *blocks = c.batch.blocks + ((int64_t)l.group * c.batch.parts + row.part) * c.batch.width;
        const int64_t slot = (int64_t)blocks[row.position / c.batch.block_size] * c.batch.block_size + row.position % c.batch.block_size;
        const int64_t at = ((int64_t)(h - H) * l.slots + slot) * Dh;  // keys of all heads, then their values
        if (s.half_cache) kernels().to_half(head, Dh, (uint16_t *)l.cache + at);
        else memcpy((float *)l.cache + at, head, sizeof(float) * Dh);
    };
    const bool grid = is_grid(l.queries.format) || is_grid(l.keys.format) || is_grid(l.values.format);
    const Normed normed = {c.hidden, l.norm_attention, l.norm_attention != nullptr, grid, s.eps, M, s.hidden, l.queries.digits, stamp};
    normed.share(t, worker);
    const int pairs = Dh / 32;
    worker.each(H + 2 * Hkv, [&](int h) {
        const Acts &acts = normed.get(t, worker.thread);
        const Matrix &w = h < H ? l.queries : h < H + Hkv ? l.keys : l.values;
        const int of = h < H ? h : h < H + Hkv ? h - H : h - H - Hkv;
        for (int b = 0; b < pairs; b++) kernels().pair(&w, of * pairs + b, &acts, qkv + h * Dh + 32 * b, N);
        if (l.qk_norm == QK_NORM_FULL) return;
        for (int m = 0; m < M; m++) finish(h, m);
    });
    if (l.qk_norm != QK_NORM_FULL) return;
    worker.each(M, [&](int m) {  // norms over all heads
        float *row = qkv + (size_t)m * N;
        kernels().norm(row, l.norm_queries, H * Dh, s.eps, row);
        kernels().norm(row + H * Dh, l.norm_keys, Hkv * Dh, s.eps, row + H * Dh);
        for (int h = 0; h < H + 2 * Hkv; h++) finish(h, m);
    });
}

void attend(Team &t, Worker &worker, const Call &c, const Layer &l, const std::vector<Query> &queries) {
    const Shape &s = c.shape;
    const int H = s.heads, Hkv = s.kv_heads, Dh = s.head_dim, N = (H + 2 * Hkv) * Dh, G = H / Hkv;
    worker.each((int)queries.size(), 1, [&](int unit) {
        const Query &u = queries[unit];
        const float *q[QUERIES];
        float *out[QUERIES];
        int firsts[QUERIES], lasts[QUERIES], n = 0, longest = 0;
        const int begin = c.first_row[u.part];
        for (int i = u.from; i < u.to; i++, n++) {
            const int m = begin + i / G, h = u.head * G + i % G, position = c.rows[m].position;
            q[n] = c.qkv + (size_t)m * N + h * Dh;
            out[n] = t.heads.x + (size_t)m * H * Dh + h * Dh;
            lasts[n] = position;
            firsts[n] = l.window && position >= l.window ? position - l.window + 1 : 0;
            longest = lasts[n] - firsts[n] + 1 > longest ? lasts[n] - firsts[n] + 1 : longest;
        }
        const int64_t stride = (2 * Dh + longest + 47) / 16 * 16, bytes = s.half_cache ? 2 : 4;
        const char *keys = (const char *)l.cache + (int64_t)u.head * l.slots * Dh * bytes;
        const Seen seen = {keys, keys + (int64_t)Hkv * l.slots * Dh * bytes,
                           c.batch.blocks + ((int64_t)l.group * c.batch.parts + u.part) * c.batch.width,
                           c.batch.block_size, Dh, s.half_cache, s.scale};
        float *scratch = t.scratch[worker.thread].scores.of((size_t)stride * n + (size_t)c.batch.block_size * Dh);
        kernels().attend(&seen, n, q, firsts, lasts, out, scratch, stride);
        for (int i = u.from; i < u.to; i++) t.heads.take(is_grid(l.out.format), begin + i / G, (u.head * G + i % G) * Dh, Dh);
    });
}

// out[m, 32 b ...] (+)= rows times a matrix; copied into `also` as well
void add_product(Team &t, Worker &worker, const Matrix &w, const Activations &acts, float *out, bool add, float *also) {
    worker.each(w.rows / 32, [&](int b) {
        float *tile = t.scratch[worker.thread].tile.of((size_t)acts.M * 64);
        kernels().pair(&w, b, &acts, tile, 32);
        for (int m = 0; m < acts.M; m++) {
            float *to = out + (size_t)m * w.rows + 32 * b;
            for (int i = 0; i < 32; i++) to[i] = add ? to[i] + tile[32 * m + i] : tile[32 * m + i];
            if (also != nullptr) memcpy(also + (size_t)m * w.rows + 32 * b, to, 32 * sizeof(float));
        }
    });
}

// stream += norm(y), row by row
void add_normed(Team &t, Worker &worker, int rows, int D, const float *y, const float *weight, float eps, float *stream,
                float *also) {
    worker.each(rows, [&](int m) {
        float *found = t.scratch[worker.thread].tile.of(D);
        kernels().norm(y + (size_t)m * D, weight, D, eps, found);
        float *to = stream + (size_t)m * D;
        for (int i = 0; i < D; i++) to[i] += found[i];
        if (also != nullptr) memcpy(also + (size_t)m * D, to, sizeof(float) * D);
    });
}

// inner = activation(gate(rows)) * up(rows)
void gate(Team &t, Worker &worker, const Matrix &gate, const Matrix &up, const Matrix &down, int activation, const Normed &normed) {
    normed.share(t, worker);
    worker.each(gate.rows / 32, [&](int g) {
        const Acts &acts = normed.get(t, worker.thread);
        float *tile = t.scratch[worker.thread].tile.of((size_t)acts.M * 64);
        kernels().pair(&gate, g, &acts, tile, 64);
        kernels().pair(&up, g, &acts, tile + 32, 64);
        for (int m = 0; m < acts.M; m++) {
            kernels().gated(activation, tile + 64 * m, tile + 64 * m + 32, 32, t.inner.x + (size_t)m * t.inner.K + 32 * g);
            t.inner.take(is_grid(down.format), m, 32 * g, 32);
        }
    });
}

void through(Team &t, Worker &worker, const Call &c, const std::vector<Query> &queries) {
    const Shape &s = c.shape;
    const int M = (int)c.rows.size(), D = s.hidden;
    int64_t stamp = c.stamp;
    for (size_t i = 0; i < c.layers.size(); i++, stamp += 2) {
        const Layer &l = c.layers[i];
        float *also = i + 1 == c.layers.size() ? c.residual : nullptr;
        if (c.part != PART_MLP) {
            project(t, worker, c, l, stamp);
            attend(t, worker, c, l, queries);
            if (l.post_attention == nullptr) {
                add_product(t, worker, l.out, t.heads, c.hidden, true, also);
            } else {
                add_product(t, worker, l.out, t.heads, c.stream, false, nullptr);
                add_normed(t, worker, M, D, c.stream, l.post_attention, s.eps, c.hidden, also);
            }
        }
        if (c.part == PART_ATTENTION) continue;
        const bool grid = is_grid(l.gate.format) || is_grid(l.up.format);
        gate(t, worker, l.gate, l.up, l.down, l.activation,
             {c.hidden, l.norm_mlp, l.norm_mlp != nullptr, grid, s.eps, M, D, l.gate.digits, stamp + 1});
        if (l.post_mlp == nullptr) {
            add_product(t, worker, l.down, t.inner, c.hidden, true, nullptr);
        } else {
            add_product(t, worker, l.down, t.inner, c.stream, false, nullptr);
            add_normed(t, worker, M, D, c.stream, l.post_mlp, s.eps, c.hidden, nullptr);
        }
    }
}

std::vector<Query> queries_of(const Call &c, int threads) {
    const int G = c.shape.heads / c.shape.kv_heads, M = (int)c.rows.size();
    // so many together that all threads have several to take
    int most = G * M * c.shape.kv_heads / (4 * threads);
    most = most < 1 ? 1 : most > QUERIES ? QUERIES : most;
    std::vector<Query> found;
    for (int part = 0; part < c.batch.parts; part++)
        for (int head = 0; head < c.shape.kv_heads; head++)
            for (int from = 0, all = c.batch.counts[part] * G; from < all; from += most)
                found.push_back({part, head, from, from + most < all ? from + most : all});
    return found;
}

// ---- heads

int check_head(const Shape &s, const Head &h, int rows) {
    const int D = s.hidden, digits = h.first.digits;
    if (rows <= 0 || D <= 0 || D % 32 || h.width <= 0) return BAD_SHAPE;
    if (h.gate.data && (h.activation < SILU || h.activation > GELU || (!h.adds && !h.lens.data))) return BAD_SHAPE;
    if (h.lens.data && (is_wrong(h.lens, D, digits) || h.lens.rows != D)) return BAD_MATRIX;
    if (h.gate.data && (is_wrong(h.gate, D, digits) || is_wrong(h.up, D, digits) || h.up.rows != h.gate.rows ||
                        is_wrong(h.down, h.gate.rows, digits) || h.down.rows != D))
        return BAD_MATRIX;
    if (is_wrong(h.first, D, digits) || (h.second.data && is_wrong(h.second, h.first.rows, digits))) return BAD_MATRIX;
    return h.width > (h.second.data ? h.second.rows : h.first.rows) ? BAD_SHAPE : OK;
}

constexpr int STRETCH = 4096;  // scores that are looked at together

struct HeadCall {
    Shape shape;
    Head head;
    int rows;
    const float *input;
    float *scores, *top, *mass, *features, *middle;
    int32_t *best;
    int64_t stamp;
    std::vector<int> places;
    std::vector<float> tops, masses;
};

void looked_at(Team &t, Worker &worker, HeadCall &c) {
    const Shape &s = c.shape;
    const Head &h = c.head;
    const int M = c.rows, D = s.hidden;
    int64_t stamp = c.stamp;
    float *unit = c.features, *made = unit + (size_t)M * D, *branch = made + (size_t)M * D;
    const float *from = c.input;
    if (h.unit) {
        worker.each(M, [&](int m) { kernels().norm(c.input + (size_t)m * D, nullptr, D, s.eps, unit + (size_t)m * D); });
        from = unit;
    }
    if (h.lens.data) {
        const Normed rows = {from, nullptr, false, is_grid(h.lens.format), s.eps, M, D, h.lens.digits, stamp++};
        rows.share(t, worker);
        worker.each(D / 32, [&](int b) {
            const Acts &acts = rows.get(t, worker.thread);
            kernels().pair(&h.lens, b, &acts, made + 32 * b, D);
        });
    }
    const float *found = h.lens.data ? made : from;
    if (h.gate.data) {
        const bool grid = is_grid(h.gate.format) || is_grid(h.up.format);
        gate(t, worker, h.gate, h.up, h.down, h.activation,
             {from, h.norm_mlp, h.norm_mlp != nullptr, grid, s.eps, M, D, h.gate.digits, stamp++});
        add_product(t, worker, h.down, t.inner, branch, false, nullptr);
        worker.each(M, [&](int m) {
            float *y = branch + (size_t)m * D, *to = made + (size_t)m * D;
            const float *base = h.adds ? c.input + (size_t)m * D : to;
            if (h.post_mlp) kernels().norm(y, h.post_mlp, D, s.eps, y);
            for (int i = 0; i < D; i++) to[i] = base[i] + y[i];
        });
        found = made;
    }
    const int width = h.second.data ? h.second.rows : h.first.rows;
    float *middle = h.second.data ? c.middle : c.scores;
    const Normed rows = {found, h.norm, h.norm != nullptr, is_grid(h.first.format), s.eps, M, D, h.first.digits, stamp++};
    rows.share(t, worker);
    worker.each(h.first.rows / 32, [&](int b) {
        const Acts &acts = rows.get(t, worker.thread);
        kernels().pair(&h.first, b, &acts, middle + 32 * b, h.first.rows);
    });
    if (h.second.data) {
        worker.each(M, [&](int m) {
            memcpy(t.heads.x + (size_t)m * h.first.rows, middle + (size_t)m * h.first.rows, sizeof(float) * h.first.rows);
            t.heads.take(is_grid(h.second.format), m, 0, h.first.rows);
        });
        worker.each(h.second.rows / 32, [&](int b) { kernels().pair(&h.second, b, &t.heads, c.scores + 32 * b, width); });
    }
    // The best token, and the sum beside it, by stretches of one length: no thread changes an order of sums
    const int stretches = (h.width + STRETCH - 1) / STRETCH;
    const auto length = [&](int i) { return h.width - i * STRETCH < STRETCH ? h.width - i * STRETCH : STRETCH; };
    worker.each(M * stretches, [&](int u) {
        const int m = u / stretches, i = u % stretches;
        kernels().best(c.scores + (size_t)m * width + i * STRETCH, length(i), &c.places[u], &c.tops[u]);
    });
    worker.each(M, [&](int m) {
        int found = 0;
        bool finite = true;
        for (int i = 0; i < stretches; i++) {
            const int u = m * stretches + i;
            finite = finite && c.places[u] >= 0;
            if (c.tops[u] > c.tops[m * stretches + found]) found = i;
        }
        c.top[m] = c.tops[m * stretches + found];
        c.best[m] = finite ? found * STRETCH + c.places[m * stretches + found] : -1;
    });
    if (c.mass == nullptr) return;
    worker.each(M * stretches, [&](int u) {
        const int m = u / stretches, i = u % stretches;
        c.masses[u] = kernels().mass(c.scores + (size_t)m * width + i * STRETCH, length(i), c.top[m]);
    });
    worker.each(M, [&](int m) {
        float sum = 0.0f;
        for (int i = 0; i < stretches; i++) sum += c.masses[m * stretches + i];
        c.mass[m] = sum;
    });
}

template <class F> int guarded(F &&work) {  // no exception leaves the library
    try {
        std::lock_guard<std::mutex> hold(team->mutex);
        return work(*team);
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    } catch (...) {
        return NO_MEMORY;
    }
}
}  // namespace

extern "C" {
int exitcpu_threads(int count) {
    return guarded([&](Team &t) {
        if (count < 1 || count > 1024) return (int)BAD_SHAPE;
        if (count != t.threads || !t.pool) {
            t.pool.reset();
            t.threads = count;
        }
        return (int)OK;
    });
}

void exitcpu_after_fork(void) {  // its threads are not here; what they held is lost
    const int threads = team->threads;
    team = new Team;
    team->threads = threads;
}

int exitcpu_layers(const Shape *shape, const Layer *layers, int32_t count, int32_t part, const Batch *batch, float *hidden,
                   float *residual) {
    if (!shape || !layers || !batch || !hidden) return BAD_SHAPE;
    if (const int wrong = check(*shape, layers, count, part, *batch)) return wrong;
    return guarded([&](Team &t) {
        Pool &pool = t.ready();
        auto c = std::make_shared<Call>();
        c->shape = *shape, c->batch = *batch, c->part = part, c->hidden = hidden, c->residual = residual;
        c->layers.assign(layers, layers + count);
        for (int i = 0; i < batch->parts; i++) {
            c->first_row.push_back((int)c->rows.size());
            for (int j = 0; j < batch->counts[i]; j++) c->rows.push_back({i, batch->starts[i] + j});
        }
        c->stamp = t.stamp;
        t.stamp += 2 * count;
        const int M = batch->rows;
        const Layer &l = layers[0];
        const int digits = part == PART_MLP ? l.gate.digits : l.queries.digits;
        c->qkv = t.qkv.of((size_t)M * (shape->heads + 2 * shape->kv_heads) * shape->head_dim);
        c->stream = t.stream.of((size_t)M * shape->hidden);
        t.heads.shape(M, shape->heads * shape->head_dim, digits);
        t.inner.shape(M, shape->inner, digits);
        t.shared.shape(M, shape->hidden, digits);
        auto queries = std::make_shared<std::vector<Query>>(queries_of(*c, pool.size));
        pool.run(PHASES * count + 2, [&t, c, queries](Worker &worker) { through(t, worker, *c, *queries); });
        return (int)OK;
    });
}

int exitcpu_head(const Shape *shape, const Head *head, int32_t rows, const float *input, float *scores, int32_t *best,
                 float *top, float *mass) {
    if (!shape || !head || !input || !scores || !best || !top) return BAD_SHAPE;
    if (const int wrong = check_head(*shape, *head, rows)) return wrong;
    return guarded([&](Team &t) {
        Pool &pool = t.ready();
        auto c = std::make_shared<HeadCall>();
        c->shape = *shape, c->head = *head, c->rows = rows, c->input = input, c->scores = scores, c->best = best, c->top = top,
        c->mass = mass;
        c->stamp = t.stamp;
        t.stamp += 3;
        const int stretches = (head->width + STRETCH - 1) / STRETCH;
        c->places.resize((size_t)rows * stretches);
        c->tops.resize((size_t)rows * stretches);
        c->masses.resize((size_t)rows * stretches);
        c->features = t.features.of((size_t)3 * rows * shape->hidden);
        t.shared.shape(rows, shape->hidden, head->first.digits);
        if (head->second.data) {
            c->middle = t.qkv.of((size_t)rows * head->first.rows);
            t.heads.shape(rows, head->first.rows, head->first.digits);
        }
        if (head->gate.data) t.inner.shape(rows, head->gate.rows, head->first.digits);
        pool.run(20, [&t, c](Worker &worker) { looked_at(t, worker, *c); });
        return (int)OK;
    });
}

int exitcpu_matmul(const Matrix *matrix, int32_t rows, const float *x, float *out) {
    if (!matrix || !x || !out || rows <= 0 || is_wrong(*matrix, matrix->cols, matrix->digits)) return BAD_MATRIX;
    return guarded([&](Team &t) {
        Pool &pool = t.ready();
        const Matrix w = *matrix;
        t.shared.shape(rows, w.cols, w.digits);
        const Normed normed = {x, nullptr, false, is_grid(w.format), 0.0f, rows, w.cols, w.digits, t.stamp++};
        pool.run(2, [&t, w, normed, out](Worker &worker) {
            normed.share(t, worker);
            worker.each(w.rows / 32, [&](int b) {
                const Acts &acts = normed.get(t, worker.thread);
                kernels().pair(&w, b, &acts, out + 32 * b, w.rows);
            });
        });
        return (int)OK;
    });
}

int64_t exitcpu_packed_bytes(int32_t format, int32_t rows, int32_t cols) {
    if (format < 0 || format >= FORMATS || rows <= 0 || cols <= 0 || rows % 32 || cols % 32) return -1;
    if ((format == FORMAT_K4 || format == FORMAT_K6) && cols % 256) return -1;
    return rows / 32 * pair_bytes(format, cols);
}

double exitcpu_read(const uint8_t *data, int64_t bytes, int32_t rounds) {
    double seconds = -1.0;
    guarded([&](Team &t) {
        Pool &pool = t.ready();
        std::vector<int64_t> found((size_t)pool.size * 8);
        const auto begin = std::chrono::steady_clock::now();
        for (int r = 0; r < rounds; r++)
            pool.run(1, [&found, data, bytes](Worker &worker) {
                typedef int64_t v8 __attribute__((vector_size(64)));
                worker.each(64 * worker.threads, [&](int i) {
                    const int64_t all = bytes / 64, units = 64 * worker.threads;
                    const v8 *at = (const v8 *)data + all * i / units, *end = (const v8 *)data + all * (i + 1) / units;
                    v8 a = {}, b = {};
                    for (; at + 2 <= end; at += 2) a ^= at[0], b ^= at[1];
                    a ^= b;
                    found[(size_t)worker.thread * 8] ^= a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
                });
            });
        seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / rounds;
        return (int)OK;
    });
    return seconds;
}
}
