// Threads that run one function together, and share its phases in chunks that each takes as it comes to them.
//
// A phase is done when all of its chunks are, not when all threads have come: on a busy machine a thread that lost its
// core holds up the others by one chunk at most, and finds nothing left to do when it is back. The run may be over by
// then. So the job keeps the function, and what it reads between its phases must be its own: only within a chunk can it
// rely on the caller, who waits for that.
#pragma once
#include <stdint.h>
#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

struct alignas(64) Phase {
    std::atomic<int> next{0}, done{0};
};

// One run of a function. It is used again when no thread may look at it any more.
struct Job {
    std::function<void(class Worker &)> work;
    std::vector<Phase> phases;
    std::atomic<int> inside{0};  // threads that may look at it
};

class Worker {  // a thread within a job
  public:
    Worker(Job &job, int thread, int threads) : thread(thread), threads(threads), job(job) {}

    // work(i) for every i < units, each once, by whichever thread comes first; returns when all are done.
    template <class F> void each(int units, int chunk, F &&work) {
        if (threads == 1) {
            for (int i = 0; i < units; i++) work(i);
            return;
        }
        Phase &phase = job.phases[at++];
        for (;;) {
            const int from = phase.next.fetch_add(chunk, std::memory_order_relaxed);
            if (from >= units) break;
            const int to = from + chunk < units ? from + chunk : units;
            for (int i = from; i < to; i++) work(i);
            if (phase.done.fetch_add(to - from, std::memory_order_acq_rel) + to - from == units) phase.done.notify_all();
        }
        wait(phase.done, units);
    }
    template <class F> void each(int units, F &&work) {  // a few chunks for each thread
        const int chunk = units / (4 * threads);
        each(units, chunk > 1 ? chunk : 1, work);
    }
    const int thread, threads;

  private:
    static void wait(std::atomic<int> &value, int wanted);
    Job &job;
    int at = 0;
};

class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    // On every thread, of at most so many phases. The work must not throw: no thread could tell the others.
    void run(int phases, std::function<void(Worker &)> work);
    const int size;

  private:
    void serve(int thread);
    void join();
    alignas(64) std::atomic<unsigned> epoch{0};
    alignas(64) std::atomic<Job *> current{nullptr};
    std::atomic<bool> stop{false};
    std::vector<std::unique_ptr<Job>> jobs;
    std::vector<std::thread> threads;
};
