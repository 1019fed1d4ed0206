// Memory for torch's larger tensors on the CPU: what is freed is kept, with its pages, for the tensors that come next.
//
// A training step frees and asks for the same memory again, in other sizes. Given back to the system, every page would be cleared
// and mapped anew at each asking. Kept in the C library's heap, a hole doesn't serve a tensor of its own size again: aligned memory
// is asked for with room to spare, so the heap grows far beyond what is ever in use. Here holes are whole pages: those that lie
// side by side are one, a tensor takes the front of one, and what is kept and in use is never much more than what was once in use
// at a time.
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace {

constexpr size_t SMALLEST = size_t(1) << 17;  // the C library serves smaller ones: those of a micro-batch are larger
constexpr size_t STEP = size_t(1) << 14;
// What is kept above the most that was ever in use, a quarter of it at most: for holes that are too small for anything. Without
// any, what one part of a step has freed is given back to make room for the next part, and asked for again in the next step.
constexpr size_t SPARE = size_t(1) << 24;
constexpr size_t LARGEST = size_t(1) << 26;  // that is mapped at once

struct Hole {  // freed, with its pages, and used by nobody
    char* place;
    size_t size;
    uint64_t freed;  // when the last of it was
};

void give_back(void* place);

class Pool final : public c10::Allocator {
public:
    explicit Pool(c10::Allocator* small) : small_(small) {}

    c10::DataPtr allocate(size_t bytes) override {
        void* place = bytes < SMALLEST ? nullptr : take((bytes + STEP - 1) / STEP * STEP);
        if (!place) return small_->allocate(bytes);  // which also knows how to say that there is no memory
        return {place, place, &give_back, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

    void put(void* place) {
        {
            std::lock_guard<std::mutex> alone(mutex_);
            auto found = used_.find(place);
            if (found != used_.end()) {
                const size_t size = found->second;
                used_.erase(found);
                in_use_ -= size;
                if (keeps_ && kept_.size() < kept_.capacity()) {  // a deleter mustn't ask for memory
                    add({(char*)place, size, ++now_});
                    shrink();
                } else {
                    munmap(place, size);
                }
                return;
            }
        }
        small_->raw_deleter()(place);
    }

    void keep(bool on) {
        std::lock_guard<std::mutex> alone(mutex_);
        if (on && !keeps_) most_ = in_use_;  // what was in use before doesn't say what will be
        keeps_ = on;
        shrink();
    }

    void lock() { mutex_.lock(); }
    void unlock() { mutex_.unlock(); }

    size_t kept() {
        std::lock_guard<std::mutex> alone(mutex_);
        return in_kept_;
    }

private:
    void* take(size_t size) {
        std::lock_guard<std::mutex> alone(mutex_);
        in_use_ += size;
        const size_t before = most_;
        if (in_use_ > most_) most_ = in_use_;
        void* place = nullptr;
        size_t best = fitting(size);
        // A hole for something much larger had better wait for its like, while there is room for a new block.
        if (best < kept_.size() && (kept_[best].size <= size + size / 4 || in_use_ + in_kept_ > room()))
            place = cut(best, size);
        if (!place && in_use_ + in_kept_ > room() && !kept_.empty()) place = grown(largest(), size);
        shrink();
        if (!place) place = mapped(size);
        if (!place) {  // a limit may have been met by what is kept
            drop(0);
            place = mapped(size);
        }
        if (place) {
            try {
                const size_t blocks = used_.size() + kept_.size() + 1;
                if (kept_.capacity() < blocks) kept_.reserve(2 * blocks);  // for when it is given back
                used_[place] = size;
                return place;
            } catch (const std::bad_alloc&) {
                munmap(place, size);
            }
        }
        in_use_ -= size;
        most_ = before;  // what was refused was never in use
        return nullptr;
    }

    // The smallest hole that is large enough, the last one freed of those; all of them if there is none.
    size_t fitting(size_t size) {
        size_t best = kept_.size();
        for (size_t i = 0; i < kept_.size(); i++)
            if (kept_[i].size >= size && (best == kept_.size() || kept_[i].size < kept_[best].size ||
                                          (kept_[i].size == kept_[best].size && kept_[i].freed > kept_[best].freed)))
                best = i;
        return best;
    }

    size_t largest() {
        size_t best = 0;
        for (size_t i = 1; i < kept_.size(); i++)
            if (kept_[i].size > kept_[best].size) best = i;
        return best;
    }

    // The first so many bytes of a hole.
    void* cut(size_t number, size_t size) {
        Hole& hole = kept_[number];
        char* place = hole.place;
        in_kept_ -= size;
        hole.place += size, hole.size -= size;
        if (!hole.size) kept_.erase(kept_.begin() + number);
        return place;
    }

    // A hole that is too short, with its pages, made longer.
    void* grown(size_t number, size_t size) {
        Hole hole = kept_[number];
        kept_.erase(kept_.begin() + number);
        in_kept_ -= hole.size;
        void* place = mremap(hole.place, hole.size, size, MREMAP_MAYMOVE);
        if (place != MAP_FAILED) {
            present((char*)place + hole.size, size - hole.size);
            return place;
        }
        munmap(hole.place, hole.size);  // of several mappings: those aren't moved together
        return nullptr;
    }

    static void* mapped(size_t size) {
        void* place = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (place == MAP_FAILED) return nullptr;
        present(place, size);
        return place;
    }

    // Have the system map these pages at once: one by one, as they are first written, they take several times as long. What
    // is large may never be written to its end, and pages that aren't there by then come by themselves.
    static void present(void* place, size_t size) {
#ifdef MADV_POPULATE_WRITE
        if (size <= LARGEST) madvise(place, size, MADV_POPULATE_WRITE);
#endif
    }

    void shrink() { drop(keeps_ ? room() - in_use_ : 0); }

    size_t room() const { return most_ + std::min(most_ / 4, SPARE); }

    // Give back to the system what is kept above `room` bytes, what lay unused longest first.
    void drop(size_t room) {
        while (in_kept_ > room) {
            size_t oldest = 0;
            for (size_t i = 1; i < kept_.size(); i++)
                if (kept_[i].freed < kept_[oldest].freed) oldest = i;
            munmap(kept_[oldest].place, kept_[oldest].size);
            in_kept_ -= kept_[oldest].size;
            kept_.erase(kept_.begin() + oldest);
        }
    }

    // Keep a hole, as one with those that it lies between.
    void add(Hole hole) {
        in_kept_ += hole.size;
        auto next = std::lower_bound(kept_.begin(), kept_.end(), hole, [](const Hole& a, const Hole& b) { return a.place < b.place; });
        const bool after = next != kept_.end() && hole.place + hole.size == next->place;
        const bool before = next != kept_.begin() && (next - 1)->place + (next - 1)->size == hole.place;
        if (before) {
            Hole& own = *(next - 1);
            own.size += hole.size, own.freed = hole.freed;
            if (after) own.size += next->size, kept_.erase(next);
        } else if (after) {
            *next = {hole.place, hole.size + next->size, hole.freed};
        } else {
            kept_.insert(next, hole);
        }
    }

    c10::Allocator* small_;
    std::mutex mutex_;
    std::unordered_map<void*, size_t> used_;
    std::vector<Hole> kept_;  // by place
    uint64_t now_ = 0;
    size_t in_use_ = 0, in_kept_ = 0, most_ = 0;
    bool keeps_ = true;
};

Pool* pool = nullptr;

void give_back(void* place) { pool->put(place); }

}  // namespace

extern "C" {

// Tensors made from here on come from the pool; 0 where torch takes them from elsewhere all the same.
int lorafit_pool_start() {
    if (pool) return c10::GetCPUAllocator() == pool;
    pool = new Pool(c10::GetDefaultCPUAllocator());
    // A process that is forked off while another thread holds the lock would wait for it for ever.
    pthread_atfork([] { pool->lock(); }, [] { pool->unlock(); }, [] { pool->unlock(); });
    c10::SetCPUAllocator(pool);
    return c10::GetCPUAllocator() == pool;
}

// Whether freed blocks are kept for the next ones. Those that are kept already are given back with `on` 0.
void lorafit_pool_keep(int on) {
    if (pool) pool->keep(on != 0);
}

// Bytes that are kept and in nobody's use.
uint64_t lorafit_pool_kept() { return pool ? pool->kept() : 0; }
}
