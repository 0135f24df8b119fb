// The tile registers of AMX.
//
// For files that are compiled once per CPU level, at the level amx: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include <cstdint>

#include <immintrin.h>

#include "common/cpu_level.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// The operand of LDTILECFG: eight tiles of 16 rows of 64 bytes.
struct TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
alignas(64) constexpr TileConfiguration kConfiguration = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Configures the tiles for this thread, and releases them at the end of the scope.
struct Tiles {
  Tiles() { _tile_loadconfig(&kConfiguration); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
