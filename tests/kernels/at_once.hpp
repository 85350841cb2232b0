// Every task on a thread of its own: what the sanitizers' drivers run kernels with.
#pragma once
#include <cstddef>
#include <thread>
#include <vector>

inline void at_once(void*, void (*task)(void*, size_t), size_t count, void* data) {
  std::vector<std::thread> threads;
  for (size_t i = 0; i < count; ++i) threads.emplace_back([=] { task(data, i); });
  for (auto& thread : threads) thread.join();
}
