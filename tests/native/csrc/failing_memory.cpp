#include "failing_memory.h"
#include <errno.h>
#include <stdlib.h>
#include <new>
#include <thread>

std::atomic<int> memory_left{-1}, asked_elsewhere{0};

namespace {
const std::thread::id first = std::this_thread::get_id();

bool is_refused() {
    if (memory_left.load() < 0) return false;
    if (std::this_thread::get_id() != first) asked_elsewhere++;
    return memory_left.fetch_sub(1) == 0;
}
}  // namespace

extern "C" int failing_memalign(void **at, size_t alignment, size_t bytes) {
    return is_refused() ? ENOMEM : posix_memalign(at, alignment, bytes);
}
void *operator new(size_t bytes) {
    void *at = is_refused() ? nullptr : malloc(bytes);
    if (at == nullptr) throw std::bad_alloc();
    return at;
}
void *operator new(size_t bytes, std::align_val_t alignment) {
    void *at = nullptr;
    if (is_refused() || posix_memalign(&at, (size_t)alignment, bytes) != 0) throw std::bad_alloc();
    return at;
}
void operator delete(void *at) noexcept { free(at); }
void operator delete(void *at, size_t) noexcept { free(at); }
void operator delete(void *at, std::align_val_t) noexcept { free(at); }
void operator delete(void *at, size_t, std::align_val_t) noexcept { free(at); }
