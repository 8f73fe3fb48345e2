#include "team.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

// A pause is about 50 ns: a barrier is worth some 50 us of spinning, the wait for the next step some 200 us.
static const int BARRIER_SPINS = 1000;
static const int IDLE_SPINS = 4000;

void Signal::raise() {
  value_.fetch_add(1, std::memory_order_seq_cst);
  // A waiter counts itself before it looks at the value a last time, so that it is seen here or sees the new value.
  if (sleepers_.load(std::memory_order_seq_cst))
    syscall(SYS_futex, (uint32_t *)&value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

void Signal::wait_while(uint32_t old, int spins) {
  for (int spin = 0; spin < spins; spin++) {
    if (value() != old) return;
    _mm_pause();
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (value_.load(std::memory_order_seq_cst) == old)
    syscall(SYS_futex, (uint32_t *)&value_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

Team::Team(int threads) : size_(threads) {
  try {
    for (int thread = 1; thread < threads; thread++) threads_.emplace_back(&Team::serve, this, thread);
  } catch (...) {  // the system gives no more threads; those that run must not outlive this
    closing_ = true;
    started_.raise();
    for (std::thread &thread : threads_) thread.join();
    throw;
  }
}

Team::~Team() {
  closing_ = true;
  started_.raise();
  for (std::thread &thread : threads_) thread.join();
}

void Team::serve(int thread) {
  for (uint32_t seen = 0;; seen++) {
    started_.wait_while(seen, IDLE_SPINS);
    if (closing_) return;
    work_(what_, thread);
    barrier();
  }
}

void Team::run(Work work, void *what) {
  work_ = work, what_ = what;
  next_ = 0;
  if (size_ > 1) started_.raise();
  work(what, 0);
  barrier();
}

void Team::barrier() {
  if (size_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    return;
  }
  uint32_t before = passed_.value();
  if (waiting_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    waiting_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    passed_.raise();
  } else {
    passed_.wait_while(before, BARRIER_SPINS);
  }
}

bool Team::claim(int total, int chunk, int &first, int &end) {
  first = next_.fetch_add(chunk, std::memory_order_relaxed);
  end = first + chunk < total ? first + chunk : total;
  return first < total;
}
