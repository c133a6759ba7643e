// The library without Python: products of cases that numpy wrote, passes of a small model with random weights, calls that
// must be refused, and threads that come and go. For sanitizers, and for processors that only an emulator has here. With
// FAILING_MEMORY each piece of memory that a call asks for is refused once (see failing_memory.h).
//
//     program CASES [INSTRUCTION SET] [THREADS]
//
// A case: six int32 (format, rows, cols, digits, M, packed bytes), then the packed bytes, x [M, cols] and the wanted
// [M, rows] as floats, then the largest error. Prints one line for each failure and exits with their number.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <thread>
#include <vector>
#include "exitcpu.h"
#include "expect.h"
#if defined(FAILING_MEMORY)
#include "failing_memory.h"
#endif

namespace {
template <class T> struct Aligned {  // from 64 bytes on, with nothing to spare behind: a sanitizer sees every byte too many
    explicit Aligned(size_t count) : count(count) {
        if (posix_memalign((void **)&at, 64, count * sizeof(T) + (count == 0)) != 0) abort();
        memset((void *)at, 0, count * sizeof(T));
    }
    ~Aligned() { free(at); }
    Aligned(const Aligned &) = delete;
    T *at;
    size_t count;
};

struct Random {
    uint32_t state = 7;
    float next() {
        state = state * 1664525u + 1013904223u;
        return (float)(state >> 8) / 8388608.0f - 1.0f;
    }
};

void cases(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == nullptr) return expect(false, "the file of cases");
    int32_t head[6];
    int count = 0;
    while (fread(head, sizeof head, 1, file) == 1) {
        const int32_t format = head[0], rows = head[1], cols = head[2], digits = head[3], M = head[4];
        Aligned<uint8_t> packed((size_t)head[5]);
        std::vector<float> x((size_t)M * cols), wanted((size_t)M * rows), found((size_t)M * rows);
        float most = 0.0f;
        const bool whole = fread(packed.at, 1, packed.count, file) == packed.count &&
                           fread(x.data(), 4, x.size(), file) == x.size() &&
                           fread(wanted.data(), 4, wanted.size(), file) == wanted.size() && fread(&most, 4, 1, file) == 1;
        expect(whole, "a whole case");
        if (!whole) break;
        expect(exitcpu_packed_bytes(format, rows, cols) == head[5], "the size of a packed matrix");
        const Matrix matrix = {packed.at, nullptr, rows, cols, format, digits};
        expect(exitcpu_matmul(&matrix, M, x.data(), found.data()) == OK, "a product");
        for (size_t i = 0; i < found.size(); i++)
            if (!(fabsf(found[i] - wanted[i]) <= most)) {
                printf("format %d digits %d M %d: %g, not %g\n", format, digits, M, found[i], wanted[i]);
                expect(false, "a product that is near enough");
                break;
            }
        for (int m = 0; m < M; m++) {  // each row by itself
            std::vector<float> one((size_t)rows);
            exitcpu_matmul(&matrix, 1, x.data() + (size_t)m * cols, one.data());
            expect(memcmp(one.data(), found.data() + (size_t)m * rows, sizeof(float) * rows) == 0, "a row alone");
        }
        count++;
    }
    fclose(file);
    printf("%d cases\n", count);
    expect(count > 0, "at least one case");
}

// A model of float weights, so that the sizes of every buffer are the caller's own.
struct Model {
    static constexpr int D = 64, H = 4, Hkv = 2, Dh = 32, F = 96, V = 160, LAYERS = 3, BLOCK = 4, BLOCKS = 24, LONGEST = 40;
    Random random;
    std::vector<Aligned<float> *> kept;
    Shape shape = {D, H, Hkv, Dh, F, 0, 1e-5f, 0.18f};
    Layer layers[LAYERS] = {};
    Head head = {};
    std::vector<float> rotations = std::vector<float>((size_t)LONGEST * Dh);
    const float *tables[4];

    float *floats(size_t count, float scale) {
        kept.push_back(new Aligned<float>(count));
        for (size_t i = 0; i < count; i++) kept.back()->at[i] = scale * random.next();
        return kept.back()->at;
    }
    Matrix matrix(int rows, int cols) {  // any order of random weights is a matrix
        return {(const uint8_t *)floats((size_t)rows * cols, 1.0f / sqrtf((float)cols)), nullptr, rows, cols, FORMAT_F32, 2};
    }
    explicit Model(bool post, int qk_norm, int activation = SILU, bool half_cache = false) {
        shape.half_cache = half_cache;
        for (Layer &layer : layers) {
            layer.queries = matrix(H * Dh, D), layer.keys = matrix(Hkv * Dh, D), layer.values = matrix(Hkv * Dh, D);
            layer.out = matrix(D, H * Dh), layer.gate = matrix(F, D), layer.up = matrix(F, D), layer.down = matrix(D, F);
            layer.norm_attention = floats(D, 1.0f), layer.norm_mlp = floats(D, 1.0f);
            if (post) layer.post_attention = floats(D, 1.0f), layer.post_mlp = floats(D, 1.0f);
            layer.qk_norm = qk_norm, layer.activation = activation;
            layer.norm_queries = floats(H * Dh, 1.0f), layer.norm_keys = floats(H * Dh, 1.0f);
            layer.cache = floats((size_t)2 * Hkv * BLOCKS * BLOCK * Dh, 0.0f);
            layer.slots = BLOCKS * BLOCK;
            layer.rotary = Dh, layer.window = &layer == layers + 1 ? 5 : 0;
        }
        head.first = matrix(V, D);
        head.lens = matrix(D, D), head.gate = matrix(F, D), head.up = matrix(F, D), head.down = matrix(D, F);
        head.norm = floats(D, 1.0f), head.unit = 1, head.width = V - 3, head.activation = activation;
        for (float &value : rotations) value = random.next();
        for (const float *&table : tables) table = rotations.data();
    }
    ~Model() {
        for (Aligned<float> *each : kept) delete each;
    }
    std::vector<float> rows(int count) {
        std::vector<float> found((size_t)count * D);
        for (float &value : found) value = random.next();
        return found;
    }
    std::vector<float> caches() const {
        std::vector<float> found;
        for (const Layer &layer : layers)
            found.insert(found.end(), (float *)layer.cache, (float *)layer.cache + (size_t)2 * Hkv * BLOCKS * BLOCK * Dh);
        return found;
    }
    Model(const Model &) = delete;
};

struct Pass {  // rows of two sequences whose blocks lie apart
    std::vector<int32_t> starts, counts, variants = {0, 0}, blocks;
    Batch batch;
    Pass(const Model &m, int first, int count_a, int count_b) : starts{first, 2 * first}, counts{count_a, count_b} {
        const int width = (Model::LONGEST + Model::BLOCK - 1) / Model::BLOCK;
        for (int part = 0; part < 2; part++)
            for (int i = 0; i < width; i++) blocks.push_back((2 * i + part) % Model::BLOCKS);
        batch = {count_a + count_b, 2, 1, Model::BLOCK, width, Model::LONGEST, starts.data(), counts.data(),
                 variants.data(), blocks.data(), m.tables};
    }
};

void passes(bool post, int qk_norm) {
    Model whole(post, qk_norm), cut(post, qk_norm);  // the same numbers
    for (int first = 0; first < 12; first += 3) {
        const Pass both(whole, first, 3, 6);
        std::vector<float> hidden = whole.rows(9), again = hidden, residual(hidden.size());
        expect(exitcpu_layers(&whole.shape, whole.layers, 3, PART_ALL, &both.batch, hidden.data(), residual.data()) == OK, "a pass");
        for (int i = 0; i < 3; i++)  // layer by layer, attention and the rest apart
            for (int part = PART_ATTENTION; part <= PART_MLP; part++)
                expect(exitcpu_layers(&cut.shape, cut.layers + i, 1, part, &both.batch, again.data(), nullptr) == OK, "a part");
        expect(memcmp(hidden.data(), again.data(), sizeof(float) * hidden.size()) == 0, "the same by parts");
        std::vector<float> scores((size_t)9 * Model::V), top(9), mass(9);
        std::vector<int32_t> best(9);
        expect(exitcpu_head(&whole.shape, &whole.head, 9, hidden.data(), scores.data(), best.data(), top.data(), mass.data()) == OK, "a head");
        for (int m = 0; m < 9; m++) {
            expect(best[m] >= 0 && best[m] < whole.head.width, "a token");
            expect(scores[(size_t)m * Model::V + best[m]] == top[m] && mass[m] >= 1.0f, "its score");
        }
        hidden[3] = NAN;
        exitcpu_head(&whole.shape, &whole.head, 9, hidden.data(), scores.data(), best.data(), top.data(), nullptr);
        expect(best[0] == -1 && best[1] >= 0, "a row that is no number, alone");
    }
}

// What is not the tiles' (norms, rotations, activations, attention, halves in the cache) as the generic kernels have it.
void near_generic(bool post, int qk_norm, int activation, bool half_cache) {
    const char *isa = exitcpu_isa();
    std::vector<float> found[2];
    for (int generic = 0; generic < 2; generic++) {
        if (generic) exitcpu_use("generic");
        Model m(post, qk_norm, activation, half_cache);
        for (int first = 0; first < 16; first += 3) {
            const Pass pass(m, first, 3, 6);
            std::vector<float> hidden = m.rows(9), scores((size_t)9 * Model::V), top(9), mass(9);
            std::vector<int32_t> best(9);
            expect(exitcpu_layers(&m.shape, m.layers, 3, PART_ALL, &pass.batch, hidden.data(), nullptr) == OK, "a pass to compare");
            expect(exitcpu_head(&m.shape, &m.head, 9, hidden.data(), scores.data(), best.data(), top.data(), mass.data()) == OK, "a head to compare");
            found[generic].insert(found[generic].end(), hidden.begin(), hidden.end());
            found[generic].insert(found[generic].end(), scores.begin(), scores.end());
            found[generic].insert(found[generic].end(), mass.begin(), mass.end());
        }
    }
    exitcpu_use(isa);
    float worst = 0.0f;
    for (size_t i = 0; i < found[0].size(); i++) {
        const float off = fabsf(found[0][i] - found[1][i]) / (1.0f + fabsf(found[1][i]));
        if (!(off <= worst)) worst = off;
    }
    if (!(worst <= (half_cache ? 5e-3f : 1e-4f))) {
        printf("post %d, qk_norm %d, activation %d, half_cache %d: off by %g\n", post, qk_norm, activation, half_cache, worst);
        expect(false, "near the generic kernels");
    }
}

#if defined(FAILING_MEMORY)
// Every piece of memory that a call asks for is refused once: an error, nothing is changed, and the next call is good.
template <class Call, class State> int each_refused(const char *what, Call call, State state) {
    const auto before = state();
    for (int number = 0;; number++) {
        exitcpu_after_fork();  // nothing is kept of former calls
        memory_left = number;
        const int code = call();
        const bool was_refused = memory_left.load() < 0;
        memory_left = -1;
        if (!was_refused) {
            expect(code == OK, what);
            return number;
        }
        expect(code == NO_MEMORY, what);
        expect(state() == before, "what a refused call leaves alone");
    }
}

void failing_memory(int threads) {
    exitcpu_threads(threads);
    for (int count : {1, 6}) {  // with few rows each thread norms for itself
        Model m(true, QK_NORM_HEAD), same(true, QK_NORM_HEAD);
        const Pass pass(m, 7, 1, count);
        const int rows = 1 + count;
        std::vector<float> hidden = m.rows(rows), expected = hidden;
        exitcpu_layers(&same.shape, same.layers, 3, PART_ALL, &pass.batch, expected.data(), nullptr);
        const int layers = each_refused(
            "layers", [&] { return exitcpu_layers(&m.shape, m.layers, 3, PART_ALL, &pass.batch, hidden.data(), nullptr); },
            [&] {
                std::vector<float> all = m.caches();
                all.insert(all.end(), hidden.begin(), hidden.end());
                return all;
            });
        expect(hidden == expected && m.caches() == same.caches(), "layers after memory was refused");
        std::vector<float> scores((size_t)rows * Model::V), top(rows), mass(rows);
        std::vector<int32_t> best(rows);
        const int head = each_refused(
            "a head", [&] { return exitcpu_head(&m.shape, &m.head, rows, hidden.data(), scores.data(), best.data(), top.data(), mass.data()); },
            [&] { return scores; });
        const int product = each_refused(
            "a product", [&] { return exitcpu_matmul(&m.head.first, rows, hidden.data(), scores.data()); }, [&] { return scores; });
        expect(layers > 10 && head > 10 && product > 5, "memory that was refused");
    }
    for (int round = 0; round < 200; round++) {
        exitcpu_after_fork();
        Model m(round % 2, round % 3);
        const Pass pass(m, round % 8, 1, 1 + round % 9);
        std::vector<float> hidden = m.rows(2 + round % 9);
        memory_left = 1 << 30;
        exitcpu_layers(&m.shape, m.layers, 3, PART_ALL, &pass.batch, hidden.data(), nullptr);
        memory_left = -1;
    }
    expect(asked_elsewhere.load() == 0, "no memory but the caller's");
}
#endif

void refused() {
    Model m(false, QK_PLAIN);
    std::vector<float> hidden((size_t)9 * Model::D);
    const auto call = [&](int code, const char *what) {
        const Pass pass(m, 3, 3, 6);
        expect(exitcpu_layers(&m.shape, m.layers, 3, PART_ALL, &pass.batch, hidden.data(), nullptr) == code, what);
    };
    call(OK, "a good call");
    m.shape.head_dim = 40, call(BAD_SHAPE, "heads of 40"), m.shape.head_dim = Model::Dh;
    m.layers[2].down.cols = 64, call(BAD_MATRIX, "too few columns"), m.layers[2].down.cols = Model::F;
    m.layers[0].queries.format = 99, call(BAD_MATRIX, "no format"), m.layers[0].queries.format = FORMAT_F32;
    m.layers[1].gate.digits = 1, call(BAD_MATRIX, "other digits"), m.layers[1].gate.digits = 2;
    m.layers[1].group = 1, call(BAD_SHAPE, "no such group"), m.layers[1].group = 0;
    m.layers[1].slots = 8, call(BAD_BATCH, "blocks behind the end"), m.layers[1].slots = Model::BLOCKS * Model::BLOCK;
    Pass pass(m, 3, 3, 6);
    pass.counts[1] = 7;
    expect(exitcpu_layers(&m.shape, m.layers, 3, PART_ALL, &pass.batch, hidden.data(), nullptr) == BAD_BATCH, "too many rows");
    pass.counts[1] = 6, pass.starts[1] = 1000;
    expect(exitcpu_layers(&m.shape, m.layers, 3, PART_ALL, &pass.batch, hidden.data(), nullptr) == BAD_BATCH, "beyond its blocks");
    pass.starts[1] = -1;
    expect(exitcpu_layers(&m.shape, m.layers, 3, PART_ALL, &pass.batch, hidden.data(), nullptr) == BAD_BATCH, "below 0");
    expect(exitcpu_layers(nullptr, m.layers, 3, PART_ALL, &pass.batch, hidden.data(), nullptr) == BAD_SHAPE, "nothing");
    m.shape.heads += 1 << 28, m.shape.kv_heads += 1 << 27, call(BAD_SHAPE, "sizes that are right but for 2^32");
    m.shape.heads = Model::H, m.shape.kv_heads = Model::Hkv;
    m.layers[0].slots = INT64_MAX / 64, call(BAD_SHAPE, "a cache beyond all addresses"), m.layers[0].slots = Model::BLOCKS * Model::BLOCK;
    expect(exitcpu_read(nullptr, 64, 1) < 0 && exitcpu_read((uint8_t *)hidden.data(), 64, 0) < 0, "nothing to read");
    expect(exitcpu_threads(0) == BAD_SHAPE && exitcpu_packed_bytes(FORMAT_K4, 32, 64) == -1, "sizes");
}
}  // namespace

int main(int count, char **words) {
    if (count < 2) return 1;
    if (count > 2) expect(exitcpu_use(words[2]) == 0, "the instruction set");
    printf("%s\n", exitcpu_isa());
    expect(exitcpu_abi() == EXITCPU_ABI && exitcpu_check() == 0, "the self test");
    const int threads = count > 3 ? atoi(words[3]) : 3;
    expect(exitcpu_threads(threads) == OK, "threads");
    cases(words[1]);
    for (int qk_norm = QK_PLAIN; qk_norm <= QK_NORM_FULL; qk_norm++)
        for (int post = 0; post < 2; post++) passes(post, qk_norm);
    for (int kind = 0; kind < 36; kind++) near_generic(kind % 2, kind / 4 % 3, kind / 12, kind / 2 % 2);
    refused();
    std::vector<std::thread> callers;  // who call at once take turns
    for (int i = 0; i < 3; i++) callers.emplace_back([] { passes(false, QK_NORM_HEAD); });
    for (std::thread &caller : callers) caller.join();
    for (int i = 1; i < 5; i++) {
        exitcpu_threads(i);
        passes(true, QK_PLAIN);
    }
#if defined(FAILING_MEMORY)
    for (int i = 1; i < 4; i++) failing_memory(i);
#endif
    printf("%d failures\n", failures);
    return failures != 0;
}
