// parallel_for, see parallel.h.
//
// Two pools of threads in one process would fight over the same cores: OpenMP's threads spin for a while after a
// loop of torch. So the loop is handed to the OpenMP library that torch has loaded, through GOMP_parallel, which
// GNU's, LLVM's and Intel's library all have.

#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace {

using Body = void (*)(void* context, int64_t item);
using GompParallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

thread_local bool inside = false;

struct Loop {
    Body body;
    void* context;
    int64_t count;
    std::atomic<int64_t> next{0};

    void work() noexcept {
        inside = true;
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, item);
        inside = false;
    }
};

// Threads that sleep between loops. One loop at a time has them.
class Pool {
  public:
    // False if another loop has the pool.
    bool run(Loop& loop, int64_t helpers) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn) return false;
        grow(helpers);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            loop_ = &loop;
            seats_ = helpers;
        }
        wake_.notify_all();
        loop.work();
        std::unique_lock<std::mutex> lock(mutex_);
        seats_ = 0;  // whoever has not woken by now is not waited for
        idle_.wait(lock, [this] { return working_ == 0; });
        return true;
    }

  private:
    void grow(int64_t helpers) {
        try {
            for (; size_ < helpers; ++size_) std::thread(&Pool::serve, this).detach();
        } catch (const std::system_error&) {
            // No more threads to be had: the loop runs on those there are.
        }
    }

    void serve() noexcept {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return seats_ > 0; });
            --seats_;
            ++working_;
            Loop* loop = loop_;
            lock.unlock();
            loop->work();
            lock.lock();
            if (--working_ == 0) idle_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, idle_;
    Loop* loop_ = nullptr;
    int64_t size_ = 0, seats_ = 0, working_ = 0;
};

std::atomic<GompParallel> shared{nullptr};
std::atomic<Pool*> own{nullptr};

// A child has none of its parent's threads, and OpenMP would wait for them for ever. The pool it inherits is left
// as it is, since one of its locks may be held.
void after_fork_in_child() {
    shared = nullptr;
    own = nullptr;
}

#if !defined(_WIN32)
[[maybe_unused]] const int watching_forks = pthread_atfork(nullptr, nullptr, after_fork_in_child);
#endif

// The pool is never destroyed: its threads may outlive static destructors.
Pool& own_pool() {
    Pool* pool = own;
    if (pool) return *pool;
    Pool* fresh = new Pool;
    if (own.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;
    return *pool;
}

}  // namespace

namespace kvcfg {

void parallel_for(int64_t count, int64_t threads, Body body, void* context) noexcept {
    Loop loop{body, context, count};
    if (count <= 1 || threads <= 1 || inside) {
        // Not Loop::work: it would forget that this thread is inside an outer loop.
        for (int64_t item = 0; item < count; ++item) body(context, item);
    } else if (GompParallel gomp_parallel = shared) {
        // All threads even if there are fewer items: GNU's library ends the threads that a smaller team lacks.
        gomp_parallel([](void* data) { static_cast<Loop*>(data)->work(); }, &loop, static_cast<unsigned>(threads), 0);
    } else if (!own_pool().run(loop, (threads < count ? threads : count) - 1)) {
        loop.work();
    }
}

}  // namespace kvcfg

extern "C" void kvcfg_share_threads(void* gomp_parallel) {
    shared = reinterpret_cast<GompParallel>(gomp_parallel);
}
