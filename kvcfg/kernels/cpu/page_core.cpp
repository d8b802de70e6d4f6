// Sequences whose pages only grow: one pool, handed out longest free first, and its cached pages by name.
//
// What kvcfg/cache/steps.py decides for such a pool, step by step the same. A name has `width` bytes and is a
// digest, or a number where names come from outside. Each call leaves what it found in the head of the core and
// in `out`, until the next call.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

namespace {

constexpr int32_t kNone = -1;
constexpr int kShortest = -64, kLongest = 63;  // lifetimes are counted from 2^-64 to 2^63 seconds

using Chain = void (*)(const uint8_t* parent, const uint8_t* ids, size_t page_bytes, size_t pages, uint8_t* names, int);
using Narrow = int (*)(const int64_t* wide, size_t count, int32_t* narrow);

struct RowHead {
    int64_t length = 0, final = 0, closed = 0, counted = 0;
    int64_t num_pages = 0, num_ids = kNone, num_names = 0;
};

struct Row : RowHead {
    std::vector<int32_t> ids, pages;
    std::vector<uint8_t> names;
    std::vector<uint8_t> root;  // what names are chained from; empty if they are given, or there are none
};

struct CoreHead {
    int64_t num_free, num_cached = 0, evictable = 0, evictions = 0, input_tokens = 0, cache_tokens = 0;
    int64_t cached = 0, length = 0, first = 0;                     // of the last alloc
    int64_t needed = 0, free = 0, evictable_left = 0, in_all = 0;  // of the last plan
    int64_t out_size = 0;
    const int32_t* out = nullptr;
    int64_t lifetimes[kLongest - kShortest + 2] = {};  // none, then by powers of two
};

struct Plan {
    int64_t hit_end, kept, fresh, revived;
    std::vector<int32_t> hits;
    bool fits;
};

struct Page {
    int32_t references, is_named, before, after;
    double named_at;
};

struct Core : CoreHead {
    const int64_t num_pages, page_size;
    const size_t width;
    const Chain chain;
    const Narrow narrow;
    std::vector<Page> page_of;   // and one more, through which the free pages are a ring
    std::vector<uint8_t> names;  // per page
    int32_t unused = 0;          // pages from here on were never handed out
    std::vector<int32_t> table;  // open addressing, at most half full
    int shift = 64;
    std::vector<int32_t> reply;

    Core(int64_t pages, int64_t size, size_t name_bytes, Chain names_of, Narrow to_int32)
        : num_pages(pages), page_size(size), width(name_bytes), chain(names_of), narrow(to_int32), page_of(pages + 1),
          names(pages * name_bytes) {
        num_free = pages;
        page_of[pages].before = page_of[pages].after = static_cast<int32_t>(pages);
        size_t places = 2;
        for (shift = 63; places < 2 * static_cast<size_t>(pages); places *= 2) --shift;
        table.assign(places, kNone);
    }

    // Names

    size_t home(const uint8_t* name) const {
        uint64_t word;
        std::memcpy(&word, name, 8);
        return word * 0x9e3779b97f4a7c15 >> shift;
    }

    const uint8_t* name_of(int32_t page) const { return names.data() + page * width; }

    size_t place_of(const uint8_t* name) const {
        size_t place = home(name);
        while (table[place] != kNone && std::memcmp(name_of(table[place]), name, width))
            place = (place + 1) & (table.size() - 1);
        return place;
    }

    int32_t find(const uint8_t* name) const { return table[place_of(name)]; }

    // The page of this name: the one that had it before, or this one from now on.
    int32_t name(int32_t page, const uint8_t* name, double now) {
        int32_t& entry = table[place_of(name)];
        if (entry != kNone) return entry;
        std::memcpy(names.data() + page * width, name, width);
        page_of[page].is_named = 1;
        page_of[page].named_at = now;
        ++num_cached;
        return entry = page;
    }

    void forget(int32_t page) {
        const size_t mask = table.size() - 1;
        size_t hole = place_of(name_of(page));
        for (size_t place = (hole + 1) & mask; table[place] != kNone; place = (place + 1) & mask) {
            const size_t start = home(name_of(table[place]));
            if (((place - start) & mask) >= ((place - hole) & mask)) {  // it may move back to the hole
                table[hole] = table[place];
                hole = place;
            }
        }
        table[hole] = kNone;
        page_of[page].is_named = 0;
        --num_cached;
    }

    // Pages

    void unlink(int32_t page) {
        page_of[page_of[page].before].after = page_of[page].after;
        page_of[page_of[page].after].before = page_of[page].before;
    }

    void hold(int32_t page) {
        if (page_of[page].references++) return;
        unlink(page);
        --num_free;
        evictable -= page_of[page].is_named;
    }

    void drop(int32_t page) {
        if (--page_of[page].references) return;
        const int32_t end = static_cast<int32_t>(num_pages), last = page_of[end].before;
        page_of[last].after = page_of[end].before = page;
        page_of[page].before = last;
        page_of[page].after = end;
        ++num_free;
        evictable += page_of[page].is_named;
    }

    int32_t take(double now) {
        --num_free;
        int32_t page = unused;
        if (unused < num_pages) {
            ++unused;
        } else {
            unlink(page = page_of[num_pages].after);
            if (page_of[page].is_named) evict(page, now);
        }
        page_of[page].references = 1;
        return page;
    }

    void evict(int32_t page, double now) {
        const double age = now - page_of[page].named_at;
        int exponent = kShortest - 1;
        if (age > 0) {
            exponent -= std::frexp(age, &exponent) == 0.5;
            exponent = exponent < kShortest ? kShortest : exponent > kLongest ? kLongest : exponent;
        }
        ++lifetimes[exponent - kShortest + 1];
        ++evictions;
        --evictable;
        forget(page);
    }

    // Sequences

    int64_t pages_for(int64_t tokens) const { return (tokens + page_size - 1) / page_size; }

    // As many names as can be known, `count` at most.
    int64_t named(Row& row, int64_t count) const {
        if (row.num_names < count && !row.root.empty()) {
            const int64_t have = row.num_names, full = row.num_ids / page_size, end = count < full ? count : full;
            if (end > have) {
                row.names.resize(end * width);
                uint8_t* to = row.names.data() + have * width;
                const uint8_t* ids = reinterpret_cast<const uint8_t*>(row.ids.data() + have * page_size);
                chain(have ? to - width : row.root.data(), ids, page_size * sizeof(int32_t), end - have, to, 0);
                row.num_names = end;
            }
        }
        return row.num_names < count ? row.num_names : count;
    }

    // Names that may be found on the way to `target` tokens: the last token of what is hashed is computed.
    int64_t wanted(Row& row, int64_t target) const { return named(row, (target - !row.root.empty()) / page_size); }

    Plan plan(Row& row, int64_t num_new_tokens, int64_t lookahead) {
        const int64_t target = row.length + num_new_tokens;
        Plan plan{row.closed, row.num_pages, 0, 0, {}, true};
        if (num_new_tokens > 1) {
            const int64_t end = wanted(row, target);
            for (int64_t place = row.closed; place < end; ++place) {
                const int32_t page = find(row.names.data() + place * width);
                if (page == kNone) break;
                plan.hits.push_back(page);
            }
            const int64_t hit_end = row.closed + static_cast<int64_t>(plan.hits.size());
            if (hit_end > row.closed && hit_end * page_size > row.length) {
                plan.hit_end = hit_end;
                plan.kept = row.closed;
            } else {
                plan.hits.clear();
            }
        }
        const int64_t held = plan.kept + static_cast<int64_t>(plan.hits.size());
        const int64_t fresh = pages_for(target + lookahead) - held;
        plan.fresh = fresh > 0 ? fresh : 0;
        for (const int32_t page : plan.hits) plan.revived += !page_of[page].references;
        needed = plan.fresh;
        free = num_free - plan.revived + row.num_pages - plan.kept;  // open pages have no other holder
        evictable_left = evictable - plan.revived;
        in_all = held + plan.fresh;
        plan.fits = needed <= free;
        return plan;
    }

    void count_input(Row& row, int64_t target) {
        const int64_t seen = row.counted > row.length ? row.counted : row.length;
        input_tokens += target > seen ? target - seen : 0;
        row.counted = target > seen ? target : seen;
    }

    void keep(Row& row, int64_t count) {
        while (row.num_pages > count) {
            drop(row.pages[--row.num_pages]);
            row.pages.pop_back();
        }
    }

    void add(Row& row, int32_t page) {
        row.pages.push_back(page);
        ++row.num_pages;
    }

    void close(Row& row, int64_t number, double now) {
        const int64_t end = row.final / page_size, known = named(row, end);
        std::vector<int32_t> moved;
        for (int64_t place = row.closed; place < known; ++place) {
            int32_t& page = row.pages[place];
            const int32_t owner = name(page, row.names.data() + place * width, now);
            if (owner != page) {
                hold(owner);
                drop(page);
                page = owner;
                moved.push_back(static_cast<int32_t>(place));
            }
        }
        say({number, row.closed, end - row.closed, static_cast<int64_t>(moved.size())});
        reply.insert(reply.end(), row.pages.begin() + row.closed, row.pages.begin() + end);
        reply.insert(reply.end(), moved.begin(), moved.end());
        row.closed = end;
    }

    void say(std::initializer_list<int64_t> words) {
        for (const int64_t word : words) reply.push_back(static_cast<int32_t>(word));
    }

    void done() {
        out = reply.data();
        out_size = static_cast<int64_t>(reply.size());
    }
};

}  // namespace

extern "C" {

// `chain` and `narrow` are those of hash_chain.cpp.
Core* kvcfg_core_new(int64_t num_pages, int64_t page_size, size_t name_bytes, Chain chain, Narrow narrow) {
    return new Core(num_pages, page_size, name_bytes, chain, narrow);
}

void kvcfg_core_delete(Core* core) { delete core; }

void kvcfg_core_delete_row(Row* row) { delete row; }

// A sequence with `count` ids (kNone: they will never be known), int64 if `wide`; null if one does not fit in int32.
Row* kvcfg_core_claim(Core* core, const void* ids, int64_t count, int wide, const uint8_t* root, const uint8_t* names,
                      int64_t num_names) {
    Row* row = new Row;
    row->num_ids = count;
    if (count > 0) {
        row->ids.resize(count);
        if (!wide) std::memcpy(row->ids.data(), ids, count * sizeof(int32_t));
        else if (!core->narrow(static_cast<const int64_t*>(ids), count, row->ids.data())) {
            delete row;
            return nullptr;
        }
    }
    if (names) row->names.assign(names, names + num_names * core->width);
    row->num_names = num_names;
    if (root) {
        row->root.assign(root, root + core->width);
        core->named(*row, count / core->page_size);
    }
    return row;
}

void kvcfg_core_extend(Row* row, const int32_t* ids, int64_t count) {
    row->ids.insert(row->ids.end(), ids, ids + count);
    row->num_ids += count;
}

// The pages added are in `out`, from page `first` of the sequence on; 0 if there are too few.
int kvcfg_core_alloc(Core* core, Row* row, int64_t num_new_tokens, int64_t lookahead, double now) {
    const int64_t target = row->length + num_new_tokens;
    const Plan plan = core->plan(*row, num_new_tokens, lookahead);
    if (!plan.fits) return 0;
    for (const int32_t page : plan.hits) core->hold(page);
    core->keep(*row, plan.kept);
    for (const int32_t page : plan.hits) core->add(*row, page);
    for (int64_t i = 0; i < plan.fresh; ++i) core->add(*row, core->take(now));
    core->cached = plan.hits.empty() ? 0 : plan.hit_end * core->page_size - row->length;
    if (core->cached) {
        row->closed = plan.hit_end;
        row->length = row->final = row->length + core->cached;
        core->cache_tokens += core->cached;
    }
    core->count_input(*row, target);
    core->length = row->length;
    core->first = plan.kept;
    core->out = row->pages.data() + plan.kept;
    core->out_size = row->num_pages - plan.kept;
    return 1;
}

// What an alloc would find: `cached`, and the free pages it would use up; whether it would succeed.
int kvcfg_core_forecast(Core* core, Row* row, int64_t num_new_tokens, int64_t lookahead) {
    const Plan plan = core->plan(*row, num_new_tokens, lookahead);
    core->cached = plan.hits.empty() ? 0 : plan.hit_end * core->page_size - row->length;
    core->needed = plan.fresh + plan.revived;
    return plan.fits;
}

// Per sequence that grew: number, first page, pages added, their ids. 0 if there are too few pages; then the
// numbers of those that asked.
int kvcfg_core_alloc_batch(Core* core, Row** rows, int64_t count, int64_t num_new_tokens, int64_t lookahead,
                           const int32_t* ids, double now) {
    core->reply.clear();
    core->needed = core->in_all = 0;
    core->free = core->num_free;
    core->evictable_left = core->evictable;
    const int64_t reach = num_new_tokens + lookahead;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t pages = core->pages_for(rows[i]->length + reach);
        if (pages > rows[i]->num_pages) {
            core->needed += pages - rows[i]->num_pages;
            core->in_all += pages;
            core->say({i});
        }
    }
    if (core->needed > core->free) {
        core->done();
        return 0;
    }
    const std::vector<int32_t> growing = core->reply;
    core->reply.clear();
    for (const int32_t i : growing) {
        Row& row = *rows[i];
        const int64_t fresh = core->pages_for(row.length + reach) - row.num_pages;
        core->say({i, row.num_pages, fresh});
        for (int64_t n = 0; n < fresh; ++n) {
            core->add(row, core->take(now));
            core->say({row.pages.back()});
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        Row& row = *rows[i];
        if (ids && row.num_ids != kNone) {
            row.ids.push_back(ids[i]);
            ++row.num_ids;
        }
        core->count_input(row, row.length + num_new_tokens);
    }
    core->done();
    return 1;
}

// Per sequence of which pages closed: number, first page, pages, how many moved, page ids, which moved. If a
// sequence has no slots or ids for its tokens nothing is done, and its number is returned; else kNone.
int64_t kvcfg_core_commit(Core* core, Row** rows, int64_t count, int64_t num_tokens, int64_t num_drafts, double now) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t length = rows[i]->length + num_tokens;
        const bool has_ids = rows[i]->num_ids == kNone || length <= rows[i]->num_ids;
        if (length > rows[i]->num_pages * core->page_size || !has_ids) return i;
    }
    core->reply.clear();
    for (int64_t i = 0; i < count; ++i) {
        Row& row = *rows[i];
        row.length += num_tokens;
        if (row.length - num_drafts > row.final) {
            row.final = row.length - num_drafts;
            if (row.final >= (row.closed + 1) * core->page_size) core->close(row, i, now);
        }
    }
    core->done();
    return kNone;
}

void kvcfg_core_truncate(Core* core, Row* row, int64_t length) {
    core->keep(*row, core->pages_for(length));
    const int64_t whole = length / core->page_size;
    row->length = length;
    if (row->final > length) row->final = length;
    if (row->closed > whole) row->closed = whole;
    if (row->num_ids > length) row->ids.resize(row->num_ids = length);
    if (!row->root.empty() && row->num_names > whole) row->names.resize((row->num_names = whole) * core->width);
}

// A copy of a sequence: closed pages are shared, `out` has new ones for the open ones; null if there are too few.
Row* kvcfg_core_fork(Core* core, const Row* parent, double now) {
    const int64_t end = core->pages_for(parent->length);
    core->needed = end - parent->closed;
    core->free = core->num_free;
    core->evictable_left = core->evictable;
    core->in_all = end;
    if (core->needed > core->free) return nullptr;
    Row* child = new Row(*parent);
    child->pages.resize(child->num_pages = child->closed);
    for (const int32_t page : child->pages) core->hold(page);
    while (child->num_pages < end) core->add(*child, core->take(now));
    core->out = child->pages.data() + child->closed;
    core->out_size = end - child->closed;
    return child;
}

void kvcfg_core_release(Core* core, Row* row, int head_first) {
    if (head_first)
        for (const int32_t page : row->pages) core->drop(page);
    else
        core->keep(*row, 0);
    delete row;
}

// The cached pages of the longest run of names.
void kvcfg_core_run(Core* core, const uint8_t* names, int64_t count) {
    core->reply.clear();
    for (int64_t i = 0; i < count; ++i) {
        const int32_t page = core->find(names + i * core->width);
        if (page == kNone) break;
        core->reply.push_back(page);
    }
    core->done();
}

// How many names of a sequence may be found on the way to `target` tokens.
int64_t kvcfg_core_wanted(const Core* core, Row* row, int64_t target) { return core->wanted(*row, target); }

const uint8_t* kvcfg_core_names(const Row* row) { return row->names.data(); }

void kvcfg_core_pages(Core* core, const Row* row) {
    core->out = row->pages.data();
    core->out_size = row->num_pages;
}

void kvcfg_core_hold(Core* core, const int32_t* pages, int64_t count) {
    for (int64_t i = 0; i < count; ++i) core->hold(pages[i]);
}

void kvcfg_core_drop(Core* core, const int32_t* pages, int64_t count) {
    for (int64_t i = 0; i < count; ++i) core->drop(pages[i]);
}

// Take the names away from pages that nothing refers to; how many had one.
int64_t kvcfg_core_forget_unused(Core* core) {
    const int64_t unused = core->evictable;
    for (int32_t page = 0; page < core->unused; ++page)
        if (core->page_of[page].is_named && !core->page_of[page].references) core->forget(page);
    core->evictable = 0;
    return unused;
}

// For a recount. Per page: references, whether it has a name, and the page that is found by that name.
void kvcfg_core_state(Core* core) {
    core->reply.clear();
    for (int32_t page = 0; page < core->num_pages; ++page) {
        const Page& state = core->page_of[page];
        core->say({state.references, state.is_named, state.is_named ? core->find(core->name_of(page)) : kNone});
    }
    core->done();
}

// The free pages, the next one first.
void kvcfg_core_free_pages(Core* core) {
    core->reply.clear();
    for (int32_t page = core->unused; page < core->num_pages; ++page) core->reply.push_back(page);
    for (int32_t page = core->page_of[core->num_pages].after; page != core->num_pages; page = core->page_of[page].after)
        core->reply.push_back(page);
    core->done();
}

// The names of all pages, one after the other; those of pages without one mean nothing.
const uint8_t* kvcfg_core_page_names(const Core* core) { return core->names.data(); }
}
