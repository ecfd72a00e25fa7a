#include "scratch.h"

#include <cstdlib>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vitfast {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kLeastHuge = 256 << 10;  // bytes; in small pages it takes the whole first-level TLB
constexpr int64_t kMostKept = 256 << 20;   // bytes of a thread; what would go over it is given back

int64_t round_up(int64_t bytes, int64_t step) { return (bytes + step - 1) / step * step; }

void* allocate(int64_t bytes) {
    const bool huge = bytes >= kLeastHuge;
    void* const data = std::aligned_alloc(huge ? kHugePage : 64, bytes);
    if (!data) throw std::bad_alloc();
#ifdef __linux__
    if (huge) madvise(data, bytes, MADV_HUGEPAGE);  // only advice: what it answers does not matter
#endif
    return data;
}

struct Block {
    void* data;
    int64_t bytes;
};

// A thread's blocks that nobody uses now.
struct Free {
    std::vector<Block> blocks;
    int64_t bytes = 0;

    ~Free() { drop(0); }

    void drop(int64_t most) {
        while (bytes > most) {
            bytes -= blocks.front().bytes;
            std::free(blocks.front().data);
            blocks.erase(blocks.begin());
        }
    }
};

thread_local Free kept;

}  // namespace

// The smallest kept block that is large enough.
KeptMemory::KeptMemory(int64_t bytes) {
    auto best = kept.blocks.end();
    for (auto block = kept.blocks.begin(); block != kept.blocks.end(); ++block) {
        if (block->bytes >= bytes && (best == kept.blocks.end() || block->bytes < best->bytes)) best = block;
    }
    if (best != kept.blocks.end()) {
        data_ = best->data;
        bytes_ = best->bytes;
        kept.bytes -= bytes_;
        kept.blocks.erase(best);
        return;
    }
    bytes_ = round_up(bytes, bytes >= kLeastHuge ? kHugePage : 4096);
    if (!kept.blocks.empty()) {  // outgrown
        kept.bytes -= kept.blocks.back().bytes;
        std::free(kept.blocks.back().data);
        kept.blocks.pop_back();
    }
    data_ = allocate(bytes_);
}

KeptMemory::~KeptMemory() {
    kept.blocks.push_back({data_, bytes_});
    kept.bytes += bytes_;
    kept.drop(kMostKept);
}

}  // namespace vitfast
