#include "pool.h"

#include <algorithm>
#include <cstring>

#include "stopwatch.h"

namespace allocator {
namespace {

constexpr std::size_t kSharedSegment = std::size_t{2} << 20;
constexpr std::size_t kLargestShared = std::size_t{1}
                                       << 20;  // above it an allocation has a segment of its own
constexpr std::size_t kLargestRequest = std::size_t{1} << 46;
constexpr unsigned char kPoison = 0xA5;

struct Backup {
  Piece* piece;
  std::vector<CopyRun> runs;
};

// What offloading the tag would copy.
std::vector<Backup> plan_backup(const Tag& tag) {
  std::vector<Backup> backups;
  for (const auto& [base, segment] : tag.segments) {
    auto content = segment->content();
    for (std::size_t i = 0; i < content.size(); ++i) {
      if (segment->pieces[i].resident) backups.push_back({&segment->pieces[i], std::move(content[i])});
    }
  }
  return backups;
}

std::size_t backup_bytes(const std::vector<Backup>& backups) {
  std::size_t bytes = 0;
  for (const Backup& backup : backups) bytes += total_bytes(backup.runs);
  return bytes;
}

// What waking the tag takes from the device.
std::size_t missing_bytes(const Tag& tag) {
  std::size_t bytes = 0;
  for (const auto& [base, segment] : tag.segments) {
    for (const Piece& piece : segment->pieces) {
      if (!segment->dying() && !piece.resident && piece.handle == 0) bytes += piece.bytes;
    }
  }
  return bytes;
}

bool any_asleep(const Tag& tag) {
  for (const auto& [base, segment] : tag.segments) {
    for (const Piece& piece : segment->pieces) {
      if (!segment->dying() && !piece.resident) return true;
    }
  }
  return false;
}

bool has_backup(const Tag* tag) {
  const auto used = [](const auto& arena) { return arena->backups > 0; };
  return std::any_of(tag->arenas.begin(), tag->arenas.end(), used);
}

bool any(const Piece&) { return true; }

bool copied(const Piece& piece) { return piece.ticket != 0; }

bool not_copied(const Piece& piece) { return piece.ticket == 0; }

void drop_backup(Piece& piece) {
  if (piece.backup != nullptr) --piece.backup->backups;
  piece.backup = nullptr;
  piece.runs.clear();
}

// Cuts runs so that none crosses the end of a piece of host memory, and says where each goes.
std::vector<CopyRun> place(const std::vector<CopyRun>& runs, const HostArena& arena, std::size_t offset) {
  std::vector<CopyRun> placed;
  for (CopyRun run : runs) {
    while (run.bytes > 0) {
      const std::size_t room = arena.chunk_end(arena.chunk_of(offset)) - offset;
      const std::size_t bytes = std::min(run.bytes, room);
      placed.push_back({run.offset, bytes, nullptr});
      run.offset += bytes;
      run.bytes -= bytes;
      offset += bytes;
    }
  }
  return placed;
}

}  // namespace

struct Pool::Move {
  Stopwatch watch;
  std::map<Tag*, sleep_pool_phase> phases;
  std::map<Tag*, HostArena*> started;  // host memory that is being made
  std::map<Tag*, double> copies_begun;
  std::vector<Piece*> brought;  // by a wake-up, in order

  sleep_pool_phase& phase(const Piece& piece) { return phases[piece.segment->tag]; }
};

Tag* Pool::find(const std::string& name) const {
  const auto same = [&name](const auto& tag) { return tag->name == name; };
  const auto tag = std::find_if(tags_.begin(), tags_.end(), same);
  return tag == tags_.end() ? nullptr : tag->get();
}

Tag& Pool::find_or_make(const std::string& name) {
  if (Tag* tag = find(name)) return *tag;
  return *tags_.emplace_back(std::make_unique<Tag>(this, name));
}

// ---- allocations ------------------------------------------------

Failure Pool::allocate(Tag& tag, std::size_t bytes, void** pointer) {
  if (tag.asleep) {
    return make_failure(SLEEP_POOL_TAG_ASLEEP, "allocate", tag.name,
                        "the tag sleeps: wake it up before allocating");
  }
  if (bytes > kLargestRequest) {
    return make_failure(SLEEP_POOL_OUT_OF_MEMORY, "allocate", tag.name, "no device has that much memory");
  }
  const std::size_t wanted = std::max<std::size_t>(bytes, 1);
  const bool shared = wanted <= kLargestShared;
  const auto fit = tag.free_blocks.lower_bound({round_up(wanted, kAlignment), nullptr, nullptr});
  if (shared && fit != tag.free_blocks.end()) {
    *pointer = fit->segment->take(fit->address, wanted);
    return nullptr;
  }
  const std::size_t segment_bytes = round_up(shared ? kSharedSegment : wanted, device_->granularity());
  Segment* segment = nullptr;
  if (Failure failure = add_segment(tag, segment_bytes, shared, &segment)) return failure;
  *pointer = segment->take(segment->base, wanted);
  return nullptr;
}

Failure Pool::add_segment(Tag& tag, std::size_t bytes, bool shared, Segment** segment) {
  bury_dying();  // what it could not return now, it tries again next time
  char* base = nullptr;
  if (Failure failure = device_->reserve(tag.name, bytes, &base)) return failure;
  auto made = std::make_unique<Segment>(&tag, tag.name, base, bytes, device_->piece_bytes(bytes),
                                        shared ? &tag.free_blocks : nullptr);
  Segment& added = *made;
  tag.segments.emplace(base, std::move(made));
  table_->emplace(base, &added);
  for (Piece& piece : added.pieces) {
    Failure failure = device_->create(piece);
    if (!failure) failure = device_->map(piece);
    if (!failure) continue;
    bury(added);
    return failure;
  }
  *segment = &added;
  return nullptr;
}

Failure Pool::free(Segment& segment, char* pointer) {
  if (!segment.give_back(pointer)) {
    return make_failure(SLEEP_POOL_INVALID_ARGUMENT, "free", segment.tag->name,
                        "no allocation starts at the pointer");
  }
  if (!segment.empty()) return nullptr;
  for (Piece& piece : segment.pieces) drop_backup(piece);
  const auto mapped = [](const Piece& piece) { return piece.mapped; };
  const bool any_mapped = std::any_of(segment.pieces.begin(), segment.pieces.end(), mapped);
  segment.leave_index();
  segment.die();
  dying_.push_back(&segment);
  // Work queued on the device may still read what was freed.
  Failure failure = any_mapped ? device_->synchronize() : nullptr;
  return failure ? std::move(failure) : bury_dying();
}

Failure Pool::bury(Segment& segment) {
  segment.leave_index();
  segment.die();
  dying_.push_back(&segment);
  return bury_dying();
}

Failure Pool::bury_dying() {
  while (!dying_.empty()) {
    Segment& segment = *dying_.back();
    for (Piece& piece : segment.pieces) {
      if (piece.mapped) {
        if (Failure failure = device_->unmap(piece)) return failure;
      }
      if (piece.handle != 0) {
        if (Failure failure = device_->release(piece)) return failure;
      }
    }
    if (Failure failure = device_->unreserve(segment)) return failure;
    dying_.pop_back();
    table_->erase(segment.base);
    segment.tag->segments.erase(segment.base);
  }
  return nullptr;
}

// ---- sleep ------------------------------------------------------

void Pool::forget_live() {
  for (auto& tag : tags_) {
    for (auto& [base, segment] : tag->segments) segment->forget_live();
  }
}

void Pool::forget_droppable() {
  for (auto& tag : tags_) {
    for (auto& [base, segment] : tag->segments) segment->forget_droppable();
  }
}

// All copies are queued first. Then the memory goes back: while the copies run what nothing is copied of, then the
// rest piece by piece as its copies are done.
Failure Pool::sleep(const Tags& offload, const Tags& discard) {
  if (Failure failure = bury_dying()) return failure;
  if (Failure failure = device_->synchronize()) return failure;
  Move move;
  Failure failure;
  for (Tag* tag : offload) {
    if (!failure) failure = start_backup(*tag, move);
  }
  for (Tag* tag : discard) {
    if (!failure) failure = let_go(*tag, move, any);
  }
  for (Tag* tag : offload) {
    if (!failure) failure = let_go(*tag, move, not_copied);
  }
  for (Tag* tag : offload) {
    if (!failure) failure = let_go(*tag, move, copied);
  }
  // Each of its chunks was waited for by now, or an earlier failure is what counts.
  for (auto& [tag, arena] : move.started) device_->finish_host(tag->name, *arena);
  if (failure) device_->synchronize();  // copies under way must not outlive the arena's next use
  for (Tag* tag : offload) end_sleep(*tag, move, failure != nullptr);
  for (Tag* tag : discard) end_sleep(*tag, move, failure != nullptr);
  return failure ? std::move(failure) : check_held();
}

void Pool::end_sleep(Tag& tag, Move& move, bool failed) {
  for (auto& [base, segment] : tag.segments) {
    for (Piece& piece : segment->pieces) {
      if (!piece.resident) continue;
      drop_backup(piece);
      piece.ticket = 0;
    }
  }
  free_incomplete(tag);
  tag.asleep = failed ? any_asleep(tag) : true;
  const sleep_pool_phase& phase = move.phases[&tag];
  if (phase.bytes > 0) tag.last_sleep = phase;
}

Failure Pool::start_backup(Tag& tag, Move& move) {
  std::vector<Backup> backups = plan_backup(tag);
  const std::size_t bytes = backup_bytes(backups);
  HostArena* arena = nullptr;
  bool started = false;
  if (bytes > 0) {
    if (Failure failure = find_or_start_arena(tag, bytes, &arena, &started)) return failure;
  }
  if (started) move.started[&tag] = arena;
  std::size_t arena_offset = 0;
  sleep_pool_phase& phase = move.phases[&tag];
  const double begun = move.watch.seconds();
  for (Backup& backup : backups) {
    if (backup.runs.empty()) continue;
    Piece& piece = *backup.piece;
    piece.runs = place(backup.runs, *arena, arena_offset);
    piece.backup = arena;
    ++arena->backups;
    if (Failure failure = back_up(piece, *arena, &arena_offset, move)) return failure;
  }
  move.copies_begun[&tag] = begun + phase.host_seconds;
  return nullptr;
}

Failure Pool::back_up(Piece& piece, HostArena& arena, std::size_t* arena_offset, Move& move) {
  sleep_pool_phase& phase = move.phase(piece);
  for (CopyRun& run : piece.runs) {
    const Stopwatch waiting;
    if (Failure failure = device_->wait_host(piece.segment->tag->name, arena, arena.chunk_of(*arena_offset))) {
      return failure;
    }
    phase.host_seconds += waiting.seconds();
    run.host = arena.at(*arena_offset);
    *arena_offset += run.bytes;
    if (Failure failure = device_->copy_out(piece, run)) return failure;
    phase.copied += run.bytes;
  }
  return device_->mark(piece);
}

Failure Pool::let_go(Tag& tag, Move& move, bool (*chosen)(const Piece&)) {
  for (auto& [base, segment] : tag.segments) {
    if (segment->dying()) continue;
    for (Piece& piece : segment->pieces) {
      if (!chosen(piece)) continue;
      if (Failure failure = let_go(piece, move)) return failure;
    }
  }
  move.phases[&tag].seconds = move.watch.seconds();
  return nullptr;
}

Failure Pool::let_go(Piece& piece, Move& move) {
  sleep_pool_phase& phase = move.phase(piece);
  if (piece.resident && piece.ticket != 0) {
    if (Failure failure = device_->wait(piece)) return failure;
    phase.copy_seconds = move.watch.seconds() - move.copies_begun[piece.segment->tag];
  }
  const Stopwatch mapping;
  if (piece.mapped) {
    if (Failure failure = device_->unmap(piece)) return failure;
  }
  piece.resident = false;
  if (piece.handle == 0) return nullptr;
  if (Failure failure = device_->release(piece)) return failure;
  phase.map_seconds += mapping.seconds();
  phase.bytes += piece.bytes;
  return nullptr;
}

// What this process holds of the device, by the handles that the driver gave and took, is what the pools know of.
Failure Pool::check_held() const {
  std::size_t known = 0;
  for (const auto& [base, segment] : *table_) {
    if (segment->tag->pool->device_ != device_) continue;
    for (const Piece& piece : segment->pieces) known += piece.handle == 0 ? 0 : piece.bytes;
  }
  if (known == device_->held_bytes()) return nullptr;
  return make_failure(SLEEP_POOL_INTERNAL, "sleep", "",
                      "the driver holds " + std::to_string(device_->held_bytes()) + " bytes, the pools know of " +
                          std::to_string(known));
}

// ---- wake up ----------------------------------------------------

// All memory is taken and all copies are queued, what has a backup first, so that the rest is mapped while the copies
// run; then they are waited for.
Failure Pool::wake_up(Tags tags, bool all_or_nothing) {
  if (Failure failure = bury_dying()) return failure;
  if (Failure failure = check_free_memory(tags)) return failure;
  std::stable_partition(tags.begin(), tags.end(), has_backup);
  Move move;
  Failure failure;
  for (Tag* tag : tags) {
    if (!failure) failure = bring_back(*tag, move);
  }
  std::size_t complete = 0;
  Failure incomplete = await_copies(move, &complete);
  if (!failure) failure = std::move(incomplete);
  if (failure) device_->synchronize();  // nothing may write any more to what is taken back
  make_resident(move, failure && all_or_nothing ? 0 : complete);
  for (Tag* tag : tags) {
    if (failure) take_back(*tag);
    tag->asleep = failure ? any_asleep(*tag) : false;
    const sleep_pool_phase& phase = move.phases[tag];
    if (phase.bytes > 0) tag->last_wake = phase;
  }
  return failure;
}

Failure Pool::bring_back(Tag& tag, Move& move) {
  move.copies_begun[&tag] = move.watch.seconds();
  for (auto& [base, segment] : tag.segments) {
    for (Piece& piece : segment->pieces) {
      if (piece.resident || segment->dying()) continue;
      if (Failure failure = bring_back(piece, move)) return failure;
      move.brought.push_back(&piece);
    }
  }
  move.phases[&tag].seconds = move.watch.seconds();
  return nullptr;
}

Failure Pool::bring_back(Piece& piece, Move& move) {
  sleep_pool_phase& phase = move.phase(piece);
  const Stopwatch mapping;
  // Left over from a sleep that failed at its release; a handle is mapped once only.
  if (piece.handle != 0 && !piece.mapped) {
    if (Failure failure = device_->release(piece)) return failure;
  }
  if (piece.handle == 0) {
    if (Failure failure = device_->create(piece)) return failure;
    phase.bytes += piece.bytes;
  }
  if (!piece.mapped) {
    if (Failure failure = device_->map(piece)) return failure;
  }
  phase.map_seconds += mapping.seconds();
  if (poison_) {  // what is not copied in shows
    if (Failure failure = device_->fill(piece, kPoison)) return failure;
  }
  for (const CopyRun& run : piece.runs) {
    if (Failure failure = device_->copy_in(piece, run)) return failure;
    phase.copied += run.bytes;
  }
  return piece.runs.empty() && !poison_ ? nullptr : device_->mark(piece);
}

// Waits in order, and says of how many pieces all went well.
Failure Pool::await_copies(Move& move, std::size_t* complete) {
  for (Piece* piece : move.brought) {
    const bool copied = piece->ticket != 0;
    if (Failure failure = device_->wait(*piece)) return failure;
    ++*complete;
    if (!copied) continue;
    sleep_pool_phase& phase = move.phase(*piece);
    phase.seconds = move.watch.seconds();
    phase.copy_seconds = phase.seconds - move.copies_begun[piece->segment->tag];
  }
  return nullptr;
}

void Pool::make_resident(const Move& move, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    move.brought[i]->resident = true;
    drop_backup(*move.brought[i]);
  }
}

// Gives back what a failed wake-up took for pieces that still sleep. What the driver does not take, their next
// sleep or wake-up finds in the piece.
void Pool::take_back(Tag& tag) {
  for (auto& [base, segment] : tag.segments) {
    for (Piece& piece : segment->pieces) {
      if (piece.resident || segment->dying()) continue;
      piece.ticket = 0;
      if (piece.mapped && device_->unmap(piece)) continue;
      if (piece.handle != 0) device_->release(piece);
    }
  }
}

Failure Pool::check_free_memory(const Tags& tags) {
  std::size_t needed = 0;
  std::string names;
  for (const Tag* tag : tags) {
    needed += missing_bytes(*tag);
    names += (names.empty() ? "" : ",") + tag->name;
  }
  if (needed == 0) return nullptr;
  MemoryInfo info;
  if (Failure failure = device_->memory_info(&info)) return failure;
  if (needed <= info.free_bytes) return nullptr;
  Failure failure = make_failure(SLEEP_POOL_OUT_OF_MEMORY, "wake_up", names,
                                 "the device has too little free memory; nothing was woken");
  failure->bytes = failure->needed = needed;
  failure->free = info.free_bytes;
  return failure;
}

// ---- host memory ------------------------------------------------

// An arena is used again when it is neither too small nor more than twice what is needed.
Failure Pool::find_or_start_arena(Tag& tag, std::size_t bytes, HostArena** arena, bool* started) {
  const auto fits = [bytes](const auto& candidate) {
    return candidate->backups == 0 && candidate->complete() && candidate->bytes() >= bytes &&
           candidate->bytes() / 2 <= bytes;
  };
  const auto found = std::find_if(tag.arenas.begin(), tag.arenas.end(), fits);
  HostArena* reused = found == tag.arenas.end() ? nullptr : found->get();
  std::uint64_t freed = 0;
  if (Failure failure = free_arenas(tag, reused, &freed)) return failure;
  *started = reused == nullptr;
  *arena = *started ? tag.arenas.emplace_back(device_->start_host(bytes)).get() : reused;
  return nullptr;
}

Failure Pool::start_host(Tag& tag, std::unique_ptr<HostArena>* arena) {
  const std::size_t bytes = backup_bytes(plan_backup(tag));
  if (bytes == 0) return nullptr;
  HostArena* made = nullptr;
  bool started = false;
  if (Failure failure = find_or_start_arena(tag, bytes, &made, &started)) return failure;
  if (!started) return nullptr;
  *arena = std::move(tag.arenas.back());
  tag.arenas.pop_back();
  return nullptr;
}

Failure Pool::finish_host(Tag& tag, std::unique_ptr<HostArena> arena) {
  HostArena& made = *tag.arenas.emplace_back(std::move(arena));
  Failure failure = device_->finish_host(tag.name, made);
  if (failure) free_incomplete(tag);
  return failure;
}

Failure Pool::free_arenas(Tag& tag, const HostArena* except, std::uint64_t* freed) {
  for (auto arena = tag.arenas.begin(); arena != tag.arenas.end();) {
    if (arena->get() == except || (*arena)->backups > 0) {
      ++arena;
      continue;
    }
    if (Failure failure = device_->free_host(tag.name, **arena, freed)) return failure;
    arena = tag.arenas.erase(arena);
  }
  return nullptr;
}

// What of an arena was made before one of its chunks failed is of no use. What cannot be returned now is returned
// like any other arena later.
void Pool::free_incomplete(Tag& tag) {
  for (auto arena = tag.arenas.begin(); arena != tag.arenas.end();) {
    std::uint64_t freed = 0;
    const bool useless = !(*arena)->complete() && (*arena)->backups == 0;
    const bool gone = useless && !device_->free_host(tag.name, **arena, &freed);
    arena = gone ? tag.arenas.erase(arena) : std::next(arena);
  }
}

Failure Pool::release_host(std::uint64_t* released) {
  if (Failure failure = bury_dying()) return failure;
  for (auto& tag : tags_) {
    if (Failure failure = free_arenas(*tag, nullptr, released)) return failure;
  }
  return nullptr;
}

Failure Pool::read_backup(const Tag& tag, const char* address, std::size_t bytes, char* to) const {
  std::size_t read = 0;
  for (const auto& [base, segment] : tag.segments) {
    for (const Piece& piece : segment->pieces) {
      if (piece.resident || piece.backup == nullptr) continue;
      for (const CopyRun& run : piece.runs) {
        const char* const begin = std::max<const char*>(address, piece.base + run.offset);
        const char* const end = std::min<const char*>(address + bytes, piece.base + run.offset + run.bytes);
        if (begin >= end) continue;
        const auto length = static_cast<std::size_t>(end - begin);
        std::memcpy(to + (begin - address), run.host + (begin - piece.base - run.offset), length);
        read += length;
      }
    }
  }
  if (read == bytes) return nullptr;
  Failure failure = make_failure(SLEEP_POOL_INVALID_ARGUMENT, "backup", tag.name,
                                 "the tag's backup holds " + std::to_string(read) +
                                     " of these bytes: it is awake, was discarded, or does not hold them");
  failure->pointer = reinterpret_cast<std::uintptr_t>(address);
  failure->bytes = bytes;
  return failure;
}

// ---- statistics -------------------------------------------------

sleep_pool_tag_stats Pool::stats(const Tag& tag) {
  sleep_pool_tag_stats stats{};
  tag.name.copy(stats.tag, sizeof stats.tag - 1);
  stats.is_asleep = tag.asleep;
  stats.persistent = tag.persistent;
  stats.sleep = tag.last_sleep;
  stats.wake = tag.last_wake;
  for (const auto& [base, segment] : tag.segments) {
    const auto content = segment->content();
    for (std::size_t i = 0; i < content.size(); ++i) {
      const Piece& piece = segment->pieces[i];
      const bool held = piece.handle != 0;
      (held ? stats.mapped : stats.asleep) += piece.bytes;
      if (held) stats.dead += piece.bytes - total_bytes(content[i]);
    }
    stats.live += segment->live_bytes();
    stats.allocations += segment->allocations();
  }
  for (const auto& arena : tag.arenas) stats.host += arena->held_bytes();
  return stats;
}

}  // namespace allocator
