// The pool alone, on threads that lose their core where it hurts most: they are held there by the test, not by a busy
// machine, so that what waits for them waits without end. Prints one line for each failure and exits with their number;
// after two minutes the system ends it.
#include <stdio.h>
#include <sys/resource.h>
#include <unistd.h>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <vector>
#include "expect.h"
#include "pool.h"

namespace {
class Gate {  // threads wait in front of it for a count of something
  public:
    void add(int more = 1) {
        std::lock_guard<std::mutex> hold(mutex);
        count += more;
        changed.notify_all();
    }
    void wait_for(int wanted) {
        std::unique_lock<std::mutex> hold(mutex);
        changed.wait(hold, [&] { return count >= wanted; });
    }
    int now() {
        std::lock_guard<std::mutex> hold(mutex);
        return count;
    }

  private:
    std::mutex mutex;
    std::condition_variable changed;
    int count = 0;
};

constexpr int THREADS = 4, UNITS = 64, PHASES = 5;

void meet(Worker &worker, Gate &come, int round) {  // each thread takes one chunk, and all are here at once
    worker.each(worker.threads, 1, [&](int) {
        come.add();
        come.wait_for(round * worker.threads);
    });
}

// Who takes the first chunk of a phase stays in it until all others are done: it holds up nothing but its own chunk.
void a_thread_held_in_a_chunk() {
    Pool pool(THREADS);
    for (int round = 0; round < 50; round++) {
        Gate done;
        std::vector<std::atomic<int>> times(UNITS);
        pool.run(1, [&](Worker &worker) {
            worker.each(UNITS, 1, [&](int i) {
                if (i == 0) done.wait_for(UNITS - 1);
                times[i].fetch_add(1);
                done.add();
            });
        });
        for (auto &each : times) expect(each.load() == 1, "each unit once, with a thread held in the first");
    }
}

// All threads but the caller stay between two phases: that run and later ones come to their end without them, and when
// they are back they find nothing to do, and take part again.
void threads_held_between_phases() {
    Pool pool(THREADS);
    for (int round = 0; round < 20; round++) {
        struct Shared {  // what a late thread may still look at
            Gate come, released, late;
            std::vector<std::atomic<int>> times = std::vector<std::atomic<int>>(UNITS * PHASES);
        };
        const auto shared = std::make_shared<Shared>();
        pool.run(PHASES + 1, [shared](Worker &worker) {
            meet(worker, shared->come, 1);
            if (worker.thread != 0) shared->released.wait_for(1);
            for (int phase = 0; phase < PHASES; phase++)
                worker.each(UNITS, [&](int i) { shared->times[phase * UNITS + i].fetch_add(1); });
            if (worker.thread != 0) shared->late.add();
        });
        expect(shared->late.now() == 0, "a run that waits for nobody");
        for (auto &each : shared->times) expect(each.load() == 1, "each unit once, by the caller");
        for (int again = 0; again < 3; again++) {
            std::atomic<int> units{0};
            pool.run(2, [&](Worker &worker) {
                worker.each(UNITS, [&](int) { units.fetch_add(1); });
                worker.each(UNITS, [&](int) { units.fetch_add(1); });
            });
            expect(units.load() == 2 * UNITS, "later runs, while threads are held in an earlier one");
        }
        shared->released.add();
        shared->late.wait_for(THREADS - 1);
        for (auto &each : shared->times) expect(each.load() == 1, "nothing left to do for who comes late");
        const auto come = std::make_shared<Gate>();
        pool.run(1, [come](Worker &worker) { meet(worker, *come, 1); });
        expect(come->now() == THREADS, "all threads again");
    }
}

// Runs that end while threads are still on their way to them, one after the other.
void many_short_runs() {
    for (int threads = 1; threads <= 9; threads += 4) {
        Pool pool(threads);
        for (int run = 0; run < 2000; run++) {
            std::atomic<int> sum{0};
            const int n = run % 7;  // a copy for who comes late
            pool.run(3, [n, &sum](Worker &worker) {
                for (int phase = 0; phase < 3; phase++) worker.each(n, [&sum](int i) { sum.fetch_add(i + 1); });
            });
            expect(sum.load() == 3 * n * (n + 1) / 2, "each unit of a short run");
        }
    }
}

void too_many_threads() {  // for the memory that their stacks may take
    rlimit before;
    getrlimit(RLIMIT_AS, &before);
    const rlimit low = {(rlim_t)512 << 20, before.rlim_max};
    setrlimit(RLIMIT_AS, &low);
    bool refused = false;
    try {
        Pool pool(1000);
    } catch (const std::system_error &) {
        refused = true;
    }
    setrlimit(RLIMIT_AS, &before);
    expect(refused, "an error where the system starts no more threads");
    Pool pool(THREADS);
    Gate come;
    pool.run(1, [&](Worker &worker) { meet(worker, come, 1); });
    expect(come.now() == THREADS, "a pool after that");
}
}  // namespace

int main(int count, char **) {
    alarm(120);
    setvbuf(stdout, nullptr, _IONBF, 0);  // the last line says what never ended
    puts("a thread held in a chunk"), a_thread_held_in_a_chunk();
    puts("threads held between phases"), threads_held_between_phases();
    puts("many short runs"), many_short_runs();
    if (count > 1) puts("too many threads"), too_many_threads();  // sanitizers need more memory than it leaves
    printf("%d failures\n", failures);
    return failures != 0;
}
