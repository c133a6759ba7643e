// What the test programs count: a line for each failure, and their number as the exit code.
#pragma once
#include <stdio.h>

static int failures = 0;
static void expect(bool good, const char *what) {
    if (good) return;
    printf("FAILED: %s\n", what);
    failures++;
}
