// Time of a call, in microseconds.
#pragma once
#include <chrono>

template <typename F>
static double microseconds(F f, int turns) {
  f();
  const auto begin = std::chrono::steady_clock::now();
  for (int k = 0; k < turns; k++) f();
  return 1e6 * std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / turns;
}
