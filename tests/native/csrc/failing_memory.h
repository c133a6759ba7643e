// Memory that is refused when the test says so. For a program that the library is part of, in which posix_memalign is called
// failing_memalign.
#pragma once
#include <atomic>

extern std::atomic<int> memory_left;      // pieces until one is refused; below 0: none is
extern std::atomic<int> asked_elsewhere;  // how many were asked for by other threads than the first, meanwhile
