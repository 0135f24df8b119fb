#include "kv_cache/page_allocator.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

namespace fastgpt {
namespace {

void expect(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

PageAllocator::PageAllocator(int64_t num_pages, int64_t page_size) : page_size_(page_size) {
  expect(num_pages >= 0, "num_pages: expected an integer >= 0, got " + std::to_string(num_pages));
  expect(num_pages <= INT32_MAX, "num_pages: expected at most 2^31 - 1, got " + std::to_string(num_pages));
  expect(page_size >= 1, "page_size: expected an integer >= 1, got " + std::to_string(page_size));
  expect(page_size <= INT32_MAX, "page_size: expected at most 2^31 - 1, got " + std::to_string(page_size));
  owners_.assign(num_pages, 0);
  free_.resize(num_pages);
  for (int64_t i = 0; i < num_pages; ++i) free_[i] = num_pages - 1 - i;
}

PageAllocator::PageAllocator(
    int64_t num_pages, int64_t page_size, int64_t next_sequence, std::vector<int64_t> free_pages,
    std::unordered_map<int64_t, Sequence> sequences)
    : PageAllocator(num_pages, page_size) {
  const auto take = [&](int64_t page) {
    expect(page >= 0 && page < num_pages, "pages: expected those of the allocator, got " + std::to_string(page));
    return &owners_[page];
  };
  for (const auto& [number, sequence] : sequences) {
    expect(number >= 0 && number < next_sequence, "sequences: expected numbers that were given out");
    expect(
        sequence.length >= 0 && static_cast<int64_t>(sequence.pages.size()) == pages_for(sequence.length),
        "sequences: expected as many pages as their lengths take");
    for (int64_t page : sequence.pages) ++*take(page);
  }
  for (int64_t page : free_pages) {
    expect(*take(page) == 0, "free_pages: expected pages of no sequence, each once");
    owners_[page] = -1;  // seen
  }
  for (int64_t& owners : owners_) {
    expect(owners != 0, "free_pages: expected every page that no sequence has");
    owners = std::max<int64_t>(owners, 0);
  }
  free_ = std::move(free_pages);
  free_.reserve(num_pages);
  sequences_ = std::move(sequences);
  next_sequence_ = next_sequence;
}

int64_t PageAllocator::allocate() {
  sequences_.try_emplace(next_sequence_);
  return next_sequence_++;
}

int64_t PageAllocator::fork(int64_t sequence) {
  const Sequence copy = find(sequence);
  sequences_.emplace(next_sequence_, copy);
  for (int64_t page : copy.pages) ++owners_[page];
  return next_sequence_++;
}

void PageAllocator::free(int64_t sequence) {
  for (int64_t page : find(sequence).pages) release(page);
  sequences_.erase(sequence);
}

void PageAllocator::truncate(int64_t number, int64_t length) {
  Sequence& sequence = find(number);
  expect(
      length >= 0 && length <= sequence.length,
      "length: expected from 0 to " + std::to_string(sequence.length) + ", got " + std::to_string(length));
  sequence.length = length;
  while (static_cast<int64_t>(sequence.pages.size()) > pages_for(length)) {
    release(sequence.pages.back());
    sequence.pages.pop_back();
  }
}

PageAllocator::Changes PageAllocator::append(const std::vector<int64_t>& sequences, const std::vector<int64_t>& counts) {
  expect(
      sequences.size() == counts.size(),
      "counts: expected one for each of " + std::to_string(sequences.size()) + " sequences, got " +
          std::to_string(counts.size()));
  std::vector<int64_t> sorted = sequences;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  expect(twice == sorted.end(), "sequences: expected distinct ones, got one twice");

  // First count the pages needed: new pages, and copies of shared last pages. If all sequences that share a page write to it,
  // the last of them keeps it.
  const auto writes_shared = [&](const Sequence& sequence, int64_t count) {
    return count > 0 && sequence.length % page_size_ != 0 && owners_[sequence.pages.back()] > 1;
  };
  int64_t new_pages = 0;
  std::unordered_map<int64_t, int64_t> writers;  // of shared pages
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence& sequence = find(sequences[i]);
    expect(counts[i] >= 0, "counts: expected integers >= 0, got " + std::to_string(counts[i]));
    if (counts[i] > num_pages() * page_size_) {
      throw OutOfPages("pages: expected room for " + std::to_string(counts[i]) + " tokens in all pages together");
    }
    const int64_t pages = pages_for(sequence.length + counts[i]);
    new_pages += pages - static_cast<int64_t>(sequence.pages.size());
    sequence.pages.reserve(pages);
    if (writes_shared(sequence, counts[i])) ++writers[sequence.pages.back()];
  }
  int64_t copies = 0;
  for (const auto& [page, count] : writers) copies += std::min(count, owners_[page] - 1);
  const int64_t needed = new_pages + copies, available = static_cast<int64_t>(free_.size());
  if (needed > available) {
    throw OutOfPages(
        "pages: expected " + std::to_string(needed) + " free for this step, got " + std::to_string(available) + " of " +
        std::to_string(num_pages()));
  }
  Changes changes;
  changes.copy_from.reserve(copies), changes.copy_to.reserve(copies);
  changes.rows.reserve(needed), changes.columns.reserve(needed), changes.pages.reserve(needed);

  // From here on nothing throws.
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence& sequence = find(sequences[i]);
    const auto set = [&](int64_t column, int64_t page) {
      changes.rows.push_back(static_cast<int64_t>(i));
      changes.columns.push_back(column), changes.pages.push_back(page);
    };
    if (writes_shared(sequence, counts[i])) {
      const int64_t shared = sequence.pages.back();
      --owners_[shared];
      sequence.pages.back() = take();
      changes.copy_from.push_back(shared), changes.copy_to.push_back(sequence.pages.back());
      set(static_cast<int64_t>(sequence.pages.size()) - 1, sequence.pages.back());
    }
    sequence.length += counts[i];
    while (static_cast<int64_t>(sequence.pages.size()) < pages_for(sequence.length)) {
      sequence.pages.push_back(take());
      set(static_cast<int64_t>(sequence.pages.size()) - 1, sequence.pages.back());
    }
  }
  return changes;
}

PageAllocator::Statistics PageAllocator::statistics() const {
  Statistics statistics{static_cast<int64_t>(free_.size()), 0, static_cast<int64_t>(sequences_.size()), 0};
  for (int64_t owners : owners_) statistics.shared_pages += owners > 1;
  for (const auto& [number, sequence] : sequences_) statistics.tokens += sequence.length;
  return statistics;
}

const PageAllocator::Sequence& PageAllocator::find(int64_t sequence) const {
  const auto found = sequences_.find(sequence);
  expect(found != sequences_.end(), "sequence: expected one that was allocated and not freed, got " + std::to_string(sequence));
  return found->second;
}

int64_t PageAllocator::take() {
  const int64_t page = free_.back();
  free_.pop_back();
  owners_[page] = 1;
  return page;
}

void PageAllocator::release(int64_t page) {
  if (--owners_[page] == 0) free_.push_back(page);  // within the reserved capacity: does not throw
}

}  // namespace fastgpt
