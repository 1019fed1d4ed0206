// Memory for torch's larger tensors on the CPU: a block that is freed is kept for the next one, resized if need be.
//
// A training step frees and asks for the same sizes again. Given back to the system, every page would be cleared and mapped
// anew at each asking. Kept in the C library's heap, a hole doesn't serve a tensor of its own size again: aligned memory is
// asked for with room to spare, so the heap grows far beyond what is ever in use. Here a block is a mapping of its own, whose
// pages move with it when it is made longer or shorter, and what is kept and in use is never much more than what was once in
// use at a time.
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
// What is kept above the most that was ever in use, a quarter of it at most. Without any, what a step has freed is given back
// to make room for blocks of another size, and asked for again in the next step: up to a quarter of a small step's time.
constexpr size_t SPARE = size_t(1) << 27;
constexpr size_t LARGEST = size_t(1) << 26;  // that is mapped at once

struct Block {
    void* place;
    size_t size;
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
                Block block{place, found->second};
                used_.erase(found);
                in_use_ -= block.size;
                if (keeps_ && kept_.size() < kept_.capacity()) {  // a deleter mustn't ask for memory
                    kept_.push_back(block);
                    in_kept_ += block.size;
                    shrink();
                } else {
                    munmap(block.place, block.size);
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
        if (!kept_.empty()) {
            size_t best = nearest(size), have = kept_[best].size;
            size_t far = have > size ? have - size : size - have;
            // A block of quite another size had better wait for its like, while there is room for a new one.
            if (far <= size / 4 || in_use_ + in_kept_ > room()) place = resized(taken(best), size);
        }
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

    // The kept block whose size is nearest, the last one freed of those.
    size_t nearest(size_t size) {
        size_t best = 0, least = SIZE_MAX;
        for (size_t i = kept_.size(); i-- > 0 && least > 0;) {
            size_t far = kept_[i].size > size ? kept_[i].size - size : size - kept_[i].size;
            if (far < least) best = i, least = far;
        }
        return best;
    }

    Block taken(size_t number) {
        Block block = kept_[number];
        kept_.erase(kept_.begin() + number);
        in_kept_ -= block.size;
        return block;
    }

    static void* resized(Block block, size_t size) {
        if (block.size == size) return block.place;
        void* place = mremap(block.place, block.size, size, MREMAP_MAYMOVE);
        if (place != MAP_FAILED) {
            if (size > block.size) present((char*)place + block.size, size - block.size);
            return place;
        }
        munmap(block.place, block.size);
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
        size_t count = 0;
        for (; in_kept_ > room; count++) {
            munmap(kept_[count].place, kept_[count].size);
            in_kept_ -= kept_[count].size;
        }
        kept_.erase(kept_.begin(), kept_.begin() + count);
    }

    c10::Allocator* small_;
    std::mutex mutex_;
    std::unordered_map<void*, size_t> used_;
    std::vector<Block> kept_;  // the last one freed at the end
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
