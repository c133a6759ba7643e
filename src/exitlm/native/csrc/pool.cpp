#include "pool.h"
#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() { asm volatile("yield"); }
#endif

namespace {
constexpr int SPINS = 2000;        // while a phase is not done: its last chunks take microseconds
constexpr int LOOKS = 64;          // spins between two looks at the clock
constexpr std::chrono::microseconds IDLE(1000);  // until the next run: the caller does a little work in between, and a
                                                 // thread that sleeps wakes up late
}  // namespace

void Worker::wait(std::atomic<int> &value, int wanted) {
    int seen = value.load(std::memory_order_acquire);
    for (int spins = 0; seen != wanted; seen = value.load(std::memory_order_acquire)) {
        relax();
        if (++spins > SPINS) value.wait(seen, std::memory_order_acquire);  // its thread has lost its core
    }
}

Pool::Pool(int count) : size(count) {
    try {
        for (int thread = 1; thread < count; thread++) threads.emplace_back([this, thread] { serve(thread); });
    } catch (...) {  // the system has no more of them, and those that run must not be left
        join();
        throw;
    }
}

Pool::~Pool() { join(); }

void Pool::join() {
    stop.store(true);
    epoch.fetch_add(1);
    epoch.notify_all();
    for (std::thread &thread : threads) thread.join();
}

void Pool::run(int phases, std::function<void(Worker &)> work) {
    if (size == 1) {
        Job alone;
        Worker worker(alone, 0, 1);
        return work(worker);
    }
    Job *job = nullptr;
    for (auto &kept : jobs) {
        int nobody = 0;
        if (job == nullptr && kept->inside.compare_exchange_strong(nobody, 1)) job = kept.get();
    }
    if (job == nullptr) {
        jobs.push_back(std::make_unique<Job>());
        job = jobs.back().get();
        job->inside.store(1);
    }
    struct Leave {
        Job *job;
        ~Leave() { job->inside.fetch_sub(1); }
    } leave{job};
    if ((int)job->phases.size() < phases) job->phases = std::vector<Phase>(phases);
    for (Phase &phase : job->phases) {
        phase.next.store(0, std::memory_order_relaxed);
        phase.done.store(0, std::memory_order_relaxed);
    }
    job->work = std::move(work);
    current.store(job);
    epoch.fetch_add(1);
    epoch.notify_all();  // does nothing where nobody sleeps
    Worker worker(*job, 0, size);
    job->work(worker);
    current.store(nullptr);  // who comes now has missed it
}

void Pool::serve(int thread) {
    unsigned seen = 0;
    for (;;) {
        const auto begin = std::chrono::steady_clock::now();
        bool idle = false;
        for (int spins = 1; epoch.load(std::memory_order_acquire) == seen; spins++) {
            relax();
            if (spins % LOOKS == 0 && !idle) idle = std::chrono::steady_clock::now() - begin > IDLE;
            if (idle) epoch.wait(seen, std::memory_order_acquire);
        }
        seen = epoch.load(std::memory_order_acquire);
        if (stop.load()) return;
        Job *job = current.load();
        if (job == nullptr) continue;
        job->inside.fetch_add(1);
        if (current.load() == job) {  // else it may be made ready for another run
            Worker worker(*job, thread, size);
            job->work(worker);
        }
        job->inside.fetch_sub(1);
    }
}
