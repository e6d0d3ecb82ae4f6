// Streams taken in turn, and events that stand for what was queued on one of them: how a driver makes tickets.
#pragma once

#include <array>
#include <cstddef>
#include <unordered_map>
#include <vector>

#include "driver.h"

namespace allocator {

template <typename Stream, typename Event>
class Lanes {
 public:
  std::array<Stream, 2>& streams() { return streams_; }
  Stream current() const { return streams_[turn_ % streams_.size()]; }

  // Takes an event that nobody waits for, null when there is none; what it is recorded for is handed out by add.
  Event take() {
    if (idle_.empty()) return nullptr;
    Event event = idle_.back();
    idle_.pop_back();
    return event;
  }
  void give_back(Event event) { idle_.push_back(event); }

  Ticket add(Event event) {
    recorded_.emplace(++turn_, event);
    return turn_;
  }
  // Null when it was waited for already.
  Event remove(Ticket ticket) {
    const auto found = recorded_.find(ticket);
    if (found == recorded_.end()) return nullptr;
    Event event = found->second;
    recorded_.erase(found);
    idle_.push_back(event);
    return event;
  }
  void remove_all() {
    for (const auto& [ticket, event] : recorded_) idle_.push_back(event);
    recorded_.clear();
  }

 private:
  std::array<Stream, 2> streams_{};
  Ticket turn_ = 0;  // the last ticket; the next one's work goes to the other stream
  std::unordered_map<Ticket, Event> recorded_;
  std::vector<Event> idle_;
};

}  // namespace allocator
