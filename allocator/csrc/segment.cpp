#include "segment.h"

#include <algorithm>
#include <iterator>
#include <numeric>

namespace allocator {
namespace {

// Adds a range that begins at or after the end of the last.
void extend(std::vector<CopyRun>* runs, std::size_t offset, std::size_t bytes) {
  const bool adjacent = !runs->empty() && runs->back().offset + runs->back().bytes == offset;
  if (adjacent) {
    runs->back().bytes += bytes;
  } else {
    runs->push_back({offset, bytes, nullptr});
  }
}

}  // namespace

Segment::Segment(Tag* tag, const std::string& tag_name, char* base, std::size_t bytes, std::size_t piece_bytes,
                 FreeIndex* index)
    : tag(tag), tag_name(tag_name), base(base), bytes(bytes), index_(index) {
  for (std::size_t begin = 0; begin < bytes; begin += piece_bytes) {
    Piece piece{};
    piece.segment = this;
    piece.base = base + begin;
    piece.bytes = std::min(piece_bytes, bytes - begin);
    pieces.push_back(std::move(piece));
  }
  index_add(blocks_.emplace(0, Block{bytes, 0}).first);
}

void* Segment::take(char* address, std::size_t requested) {
  const auto block = blocks_.find(static_cast<std::size_t>(address - base));
  const std::size_t taken = round_up(requested, kAlignment);
  const std::size_t left = block->second.bytes - taken;
  if (left > 0) index_add(blocks_.emplace(block->first + taken, Block{left, 0}).first);
  index_remove(block);
  block->second = {taken, requested};
  ++allocations_;
  live_bytes_ += requested;
  return address;
}

bool Segment::give_back(char* address) {
  auto block = blocks_.find(static_cast<std::size_t>(address - base));
  if (block == blocks_.end() || block->second.requested == 0) return false;
  --allocations_;
  live_bytes_ -= block->second.requested;
  block->second.requested = 0;
  merge_with_next(block);
  if (block != blocks_.begin() && std::prev(block)->second.requested == 0) {
    block = std::prev(block);
    index_remove(block);
    merge_with_next(block);
  }
  index_add(block);
  return true;
}

// Takes in the next block when it is free; the block itself is in no index while that happens.
void Segment::merge_with_next(Blocks::iterator block) {
  const auto next = std::next(block);
  if (next == blocks_.end() || next->second.requested != 0) return;
  index_remove(next);
  block->second.bytes += next->second.bytes;
  blocks_.erase(next);
}

void Segment::index_add(Blocks::const_iterator block) {
  if (index_ != nullptr) index_->insert({block->second.bytes, base + block->first, this});
}

void Segment::index_remove(Blocks::const_iterator block) {
  if (index_ != nullptr) index_->erase({block->second.bytes, base + block->first, this});
}

void Segment::leave_index() {
  for (auto block = blocks_.cbegin(); block != blocks_.cend(); ++block) index_remove(block);
  index_ = nullptr;
}

void Segment::add_live(const char* address, std::size_t requested) {
  const auto offset = static_cast<std::size_t>(address - base);
  live_[offset] = std::min(round_up(requested, kAlignment), bytes - offset);
}

// Rounded inwards, so that what is left is aligned. What is dropped twice is dropped once.
void Segment::drop(const char* address, std::size_t requested) {
  std::size_t begin = round_up(static_cast<std::size_t>(address - base), kAlignment);
  std::size_t end = std::min(static_cast<std::size_t>(address - base) + requested, bytes) / kAlignment * kAlignment;
  auto next = droppable_.upper_bound(begin);
  if (next != droppable_.begin() && std::prev(next)->first + std::prev(next)->second >= begin) next = std::prev(next);
  while (next != droppable_.end() && next->first <= end) {
    begin = std::min(begin, next->first);
    end = std::max(end, next->first + next->second);
    next = droppable_.erase(next);
  }
  if (begin < end) droppable_[begin] = end - begin;
}

std::vector<std::pair<std::size_t, std::size_t>> Segment::live_ranges() const {
  if (knows_live_) return {live_.begin(), live_.end()};
  std::vector<std::pair<std::size_t, std::size_t>> ranges;
  for (const auto& [offset, block] : blocks_) {
    if (block.requested != 0) ranges.emplace_back(offset, block.bytes);
  }
  return ranges;
}

std::vector<std::vector<CopyRun>> Segment::content() const {
  std::vector<std::vector<CopyRun>> runs(pieces.size());
  const std::size_t piece_bytes = pieces.front().bytes;
  const auto add = [&](std::size_t begin, std::size_t end) {
    while (begin < end) {
      const std::size_t index = begin / piece_bytes;
      const std::size_t taken = std::min(end, (index + 1) * piece_bytes) - begin;
      extend(&runs[index], begin - index * piece_bytes, taken);
      begin += taken;
    }
  };
  for (const auto& [offset, length] : live_ranges()) {
    std::size_t begin = offset;
    auto dropped = droppable_.upper_bound(offset);
    if (dropped != droppable_.begin()) dropped = std::prev(dropped);
    for (; dropped != droppable_.end() && dropped->first < offset + length; ++dropped) {
      if (dropped->first + dropped->second <= begin) continue;
      add(begin, std::max(begin, dropped->first));
      begin = dropped->first + dropped->second;
    }
    add(begin, offset + length);
  }
  return runs;
}

std::size_t total_bytes(const std::vector<CopyRun>& runs) {
  const auto add = [](std::size_t sum, const CopyRun& run) { return sum + run.bytes; };
  return std::accumulate(runs.begin(), runs.end(), std::size_t{0}, add);
}

}  // namespace allocator
