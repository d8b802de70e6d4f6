// Splits a call into items, and gives them to threads.

#include "attend.h"

#include <cstdlib>
#include <vector>

#include "instructions.h"
#include "parallel.h"

namespace kvcfg {
namespace {

constexpr int64_t kSmallestSplit = 512;  // tokens; below this a split costs more than it gives

const Kernels& kernels_here() {
#if defined(__x86_64__)
    static const Kernels& chosen =
        has_avx512_vnni() ? kAvx512Kernels : has_avx2() ? kAvx2Kernels : kPortableKernels;
    return chosen;
#else
    return kPortableKernels;
#endif
}

// Scratch memory of a thread, kept from call to call.
class Scratch {
public:
    ~Scratch() { std::free(memory_); }
    uint8_t* of(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = (bytes + 4095) / 4096 * 4096;
            memory_ = static_cast<uint8_t*>(std::aligned_alloc(4096, size_));
        }
        return memory_;
    }

private:
    uint8_t* memory_ = nullptr;
    int64_t size_ = 0;
};

// Products below which other threads cost more than they give: some 20 microseconds of one.
constexpr int64_t kSmallestShare = 1 << 20;

struct Merge {
    Item item;  // the first of those that are merged
    int64_t count, stride;
};

struct Job {
    const AttendCall& call;
    const Kernels& kernels;
    std::vector<Item> items;
    std::vector<Merge> merges;
};

void run_one(void* context, int64_t number) {
    const Job& job = *static_cast<const Job*>(context);
    static thread_local Scratch scratch;
    const Item& item = job.items[number];
    job.kernels.run(job.call, item, scratch.of(job.kernels.scratch_bytes(job.call, item)));
}

void merge_one(void* context, int64_t number) {
    const Job& job = *static_cast<const Job*>(context);
    const Merge& merge = job.merges[number];
    job.kernels.merge(job.call, merge.item, merge.item.partial, merge.count, merge.stride);
}

// The tokens that some queries see between them.
Item item_of(const AttendCall& call, int64_t sequence, int64_t query_begin, int64_t query_end, int64_t head_begin,
             int64_t head_end) {
    int64_t begin = INT64_MAX, end = 0;
    for (int64_t query = query_begin; query < query_end; ++query) {
        if (call.first[query] >= call.stop[query]) continue;
        if (call.first[query] < begin) begin = call.first[query];
        if (call.stop[query] > end) end = call.stop[query];
    }
    return {sequence, query_begin, query_end, head_begin, head_end, end == 0 ? 0 : begin, end, nullptr};
}

// Few queries: an item takes all heads of a run of tokens, so that pages are read as they lie.
// Many queries: an item takes some of them in one head, which is bound by arithmetic.
void split(Job& job, std::vector<float>& partials) {
    const AttendCall& call = job.call;
    const int64_t n_heads = call.layout->n_kv_heads, group = call.n_q_heads / n_heads;
    int64_t seen = 0;
    std::vector<Item> few;
    for (int64_t sequence = 0; sequence < call.num_sequences; ++sequence) {
        const int64_t begin = call.query_starts[sequence], end = call.query_starts[sequence + 1];
        if (begin == end) continue;
        if ((end - begin) * group <= kMaxRows) {
            few.push_back(item_of(call, sequence, begin, end, 0, n_heads));
            seen += few.back().token_end - few.back().token_begin;
            continue;
        }
        const int64_t step = kMaxRows / group > 0 ? kMaxRows / group : 1;
        for (int64_t last = end; last > begin; last -= step) {  // the longest ones first
            const int64_t first = last - step > begin ? last - step : begin;
            for (int64_t head = 0; head < n_heads; ++head) {
                job.items.push_back(item_of(call, sequence, first, last, head, head + 1));
            }
        }
    }
    // Four items a thread keep all of them busy to the end.
    int64_t share = call.threads > 1 ? seen / (4 * call.threads) : INT64_MAX - 128;
    share = share < kSmallestSplit ? kSmallestSplit : (share + 127) / 128 * 128;
    int64_t floats = 0;
    for (const Item& item : few) {
        const int64_t tokens = item.token_end - item.token_begin, parts = (tokens + share - 1) / share;
        if (parts > 1) floats += parts * n_heads * (item.query_end - item.query_begin) * group * (2 + call.layout->values.dim);
    }
    partials.resize(floats);
    floats = 0;
    for (Item item : few) {
        const int64_t end = item.token_end, parts = (end - item.token_begin + share - 1) / share;
        if (parts <= 1) {
            job.items.push_back(item);
            continue;
        }
        const int64_t stride = n_heads * (item.query_end - item.query_begin) * group * (2 + call.layout->values.dim);
        item.partial = partials.data() + floats;
        floats += parts * stride;
        job.merges.push_back({item, parts, stride});
        for (int64_t part = 0; part < parts; ++part) {
            item.token_end = item.token_begin + share < end ? item.token_begin + share : end;
            job.items.push_back(item);
            item.token_begin = item.token_end;
            item.partial += stride;
        }
    }
}

}  // namespace
}  // namespace kvcfg

extern "C" int kvcfg_attend(const kvcfg::AttendCall* call) {
    using namespace kvcfg;
    const PageLayout& layout = *call->layout;
    const bool too_wide = layout.keys.dim > 4096 || layout.values.dim > 4096;
    if (too_wide || call->n_q_heads % layout.n_kv_heads != 0) return 1;
    if (call->query_type != kFloat32 && call->query_type != kBFloat16) return 1;
    Job job{*call, kernels_here(), {}, {}};
    std::vector<float> partials;
    split(job, partials);
    int64_t products = 0;
    for (const Item& item : job.items) {
        products += rows_of(*call, item) * (item.head_end - item.head_begin) * (item.token_end - item.token_begin) *
                    (layout.keys.dim + layout.values.dim);
    }
    const int64_t threads = products < kSmallestShare ? 1 : call->threads;
    parallel_for(static_cast<int64_t>(job.items.size()), threads, run_one, &job);
    if (!job.merges.empty()) {
        parallel_for(static_cast<int64_t>(job.merges.size()), threads, merge_one, &job);
    }
    return 0;
}
