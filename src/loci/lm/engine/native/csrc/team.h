// A session's threads: they share a step's work, wait for each other briefly by spinning, and sleep when it takes long.
// Never pinned: other processes share the cores.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// A number that grows; threads wait until it has left a value.
class Signal {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void raise();
  void wait_while(uint32_t old, int spins);

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
};

class Team {
 public:
  typedef void (*Work)(void *what, int thread);

  explicit Team(int threads);
  ~Team();
  Team(const Team &) = delete;
  Team &operator=(const Team &) = delete;

  int size() const { return size_; }
  // Run the work on all threads, the caller's being thread 0, and return when all are done.
  void run(Work work, void *what);
  // Inside the work: wait until all threads are here. Claims start anew.
  void barrier();
  // Inside the work, between two barriers: the next `chunk` of `total` items that nobody has taken. False: none is left.
  bool claim(int total, int chunk, int &first, int &end);

 private:
  void serve(int thread);

  const int size_;
  std::vector<std::thread> threads_;
  Signal started_, passed_;
  std::atomic<int> waiting_{0};
  std::atomic<int> next_{0};
  std::atomic<bool> closing_{false};
  Work work_ = nullptr;
  void *what_ = nullptr;
};
