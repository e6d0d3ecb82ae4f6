// Threads allocate and free in regions of their own, and one prepares host memory, while another tag sleeps and wakes
// with driver calls failing. Takes the seconds that it is to go on for.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "capi.h"
#include "host_arena.h"

namespace {

constexpr int kDevice = -1;
constexpr int kWorkers = 8;

std::atomic<bool> end{false};
std::atomic<long> rounds{0};

void require(bool condition, const char* what) {
  if (condition) return;
  sleep_pool_error error;
  sleep_pool_last_error(&error);
  std::fprintf(stderr, "%s: %s %s\n", what, error.phase, error.message);
  std::exit(1);
}

struct Allocation {
  unsigned char* memory;
  std::size_t bytes;
  unsigned char value;

  void check() const { require(memory[0] == value && memory[bytes - 1] == value, "content"); }
};

Allocation allocate(std::mt19937& random) {
  const std::size_t bytes = std::size_t{1} << random() % 22;
  void* memory = sleep_pool_malloc(bytes, kDevice, nullptr);
  require(memory != nullptr, "malloc");
  const auto value = static_cast<unsigned char>(random());
  std::memset(memory, value, bytes);
  return {static_cast<unsigned char*>(memory), bytes, value};
}

void free_all(std::vector<Allocation>* allocations) {
  for (const Allocation& allocation : *allocations) {
    allocation.check();
    sleep_pool_free(allocation.memory, allocation.bytes, kDevice, nullptr);
  }
  allocations->clear();
}

void work(sleep_pool* pool, int number) {
  const std::string tag = "worker" + std::to_string(number);
  std::mt19937 random(static_cast<unsigned>(number));
  std::vector<Allocation> allocations;
  while (!end) {
    std::uint64_t region = 0;
    require(sleep_pool_enter(pool, tag.c_str(), &region) == 0, "enter");
    for (int i = 0; i < 20; ++i) allocations.push_back(allocate(random));
    require(sleep_pool_leave(pool, region) == 0, "leave");
    free_all(&allocations);
    ++rounds;
  }
}

void prepare(sleep_pool* pool) {
  while (!end) sleep_pool_prepare_host(pool, "sleeper");  // an injected fault may be met here
}

// Chunks are used while later ones are still being made.
void make_arena_on_threads() {
  constexpr std::size_t kChunk = 4096;
  allocator::HostArena arena(100 * kChunk - 64, kChunk);
  arena.start(8, [](std::size_t, std::size_t bytes, void** memory) {
    *memory = std::malloc(bytes);
    return allocator::Status{};
  });
  for (std::size_t chunk = 0; chunk < arena.chunk_count(); ++chunk) {
    require(arena.wait(chunk).ok(), "chunk");
    std::memset(arena.at(chunk * kChunk), 1, arena.chunk_end(chunk) - chunk * kChunk);
  }
  arena.join();
  require(arena.complete(), "arena");
  for (auto& chunk : arena.chunks()) std::free(chunk.memory);
}

// A thread that runs out of memory of its own fails its chunk and nothing else.
void fail_on_a_thread() {
  allocator::HostArena arena(10 * 4096, 4096);
  arena.start(4, [](std::size_t index, std::size_t, void**) -> allocator::Status {
    if (index == 3) throw std::bad_alloc();
    return {};
  });
  require(arena.wait(2).ok() && arena.wait(3).outcome == allocator::Outcome::kOutOfMemory, "failed chunk");
  arena.join();
}

void sleep_and_wake(sleep_pool* pool, const std::vector<Allocation>& sleepers, std::mt19937& random) {
  const char* tag = "sleeper";
  // Faults of calls that workers make too would be theirs.
  const int faults[] = {SLEEP_POOL_COPY_OUT, SLEEP_POOL_COPY_IN, SLEEP_POOL_WAIT, SLEEP_POOL_HOST_ALLOC};
  sleep_pool_inject_fault(pool, faults[random() % 4], 1 + random() % 8);
  while (sleep_pool_sleep(pool, &tag, 1, nullptr, 0, nullptr, nullptr, 0) != 0) continue;
  sleep_pool_inject_fault(pool, faults[random() % 4], 1 + random() % 8);
  while (sleep_pool_wake_up(pool, &tag, 1, random() % 2) != 0) continue;
  for (const Allocation& allocation : sleepers) allocation.check();
}

}  // namespace

int main(int, char** arguments) {
  using Clock = std::chrono::steady_clock;
  const auto last = Clock::now() + std::chrono::seconds(std::atoi(arguments[1]));
  sleep_pool* pool = nullptr;
  require(sleep_pool_open("cpu", kDevice, "default", &pool) == 0, "open");
  require(sleep_pool_set_handle_bytes(pool, 64 << 10) == 0, "set_handle_bytes");
  make_arena_on_threads();
  fail_on_a_thread();
  std::mt19937 random(99);
  std::vector<Allocation> sleepers;
  std::uint64_t region = 0;
  require(sleep_pool_enter(pool, "sleeper", &region) == 0, "enter");
  for (int i = 0; i < 40; ++i) sleepers.push_back(allocate(random));
  require(sleep_pool_leave(pool, region) == 0, "leave");

  std::vector<std::thread> threads;
  for (int i = 0; i < kWorkers; ++i) threads.emplace_back(work, pool, i);
  threads.emplace_back(prepare, pool);
  long cycles = 0;
  for (; Clock::now() < last; ++cycles) sleep_and_wake(pool, sleepers, random);
  end = true;
  for (std::thread& thread : threads) thread.join();
  free_all(&sleepers);

  std::uint64_t released = 0;
  require(sleep_pool_release_host(pool, &released) == 0 && released > 0, "release_host");
  std::uint64_t calls[SLEEP_POOL_CALLS];
  require(sleep_pool_driver_calls(pool, calls) == 0, "calls");
  require(calls[SLEEP_POOL_CREATE] == calls[SLEEP_POOL_RELEASE], "handles");
  require(calls[SLEEP_POOL_HOST_ALLOC] == calls[SLEEP_POOL_HOST_FREE], "arenas");
  require(cycles > 0 && rounds > kWorkers, "progress");
  std::printf("clean: %ld cycles, %ld rounds\n", cycles, rounds.load());
}
