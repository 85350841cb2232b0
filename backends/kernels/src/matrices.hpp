// Products of 8 bits on AMX's matrix registers: up to 32 rows by 32 columns at once. Sums are exact, so they are Int8::add's bit for bit.
//
// A register holds 16 rows of 64 bytes: of inputs 16 rows by 16 units, of weights 16 units by 16 columns, of sums 16 rows by 16 columns.
#pragma once
#include <atomic>

#include "formats.hpp"
#if defined(__AMX_INT8__) && defined(__linux__)
#define STRUCTURED_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace structured {

constexpr size_t SIDE = 16;  // rows, units and columns of a register
inline std::atomic<bool> matrices_wanted{true};

#if defined(STRUCTURED_AMX)
constexpr size_t TALLEST = 2 * SIDE;

// What was written lies in memory: compilers do not know that the instructions below read it.
inline void settled(const void* at) { __asm__ volatile("" : : "r"(at) : "memory"); }

// The registers of this thread, shaped for as long as it lives and then as they were: others multiply on them too.
class Matrices {
  struct alignas(64) Shapes {
    uint8_t palette = 1, row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Shapes before_;

 public:
  Matrices() {
    _tile_storeconfig(&before_);
    Shapes full;
    for (int i = 0; i < 8; ++i) full.bytes[i] = 64, full.rows[i] = SIDE;
    settled(&full);
    _tile_loadconfig(&full);
  }
  ~Matrices() {
    settled(&before_);
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }
  Matrices(const Matrices&) = delete;
  Matrices& operator=(const Matrices&) = delete;

  // Whether the system lets this process use them; it wants to be asked.
  static bool allowed() {
    static const bool found = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA
    return found && matrices_wanted;
  }
};

// One or two vectors of columns of weights, a unit's `next` bytes behind those of the one before.
template <int WIDE> struct Columns {
  static constexpr size_t VECTOR = 4 * SIDE;
  const int8_t* w;
  size_t next, units, whole;
  alignas(64) int8_t last[SIDE * WIDE * VECTOR];  // the units beyond a multiple of 16, and zeros behind them

  Columns(const int8_t* w, size_t next, size_t units) : w(w), next(next), units(units), whole(units - units % SIDE) {
    if (units > whole) std::memset(last, 0, sizeof last);
    for (size_t u = whole; u < units; ++u) std::memcpy(last + (u - whole) * WIDE * VECTOR, w + u * next, WIDE * VECTOR);
    settled(last);
  }
};

// sums[r][v] = sum over units u of x[r * rows + u] w[u][v], for 16 or 32 rows. Of x rows and units are read beyond those that count, up to
// whole registers.
template <int TALL, int WIDE> inline void product(const uint32_t* x, size_t rows, const Columns<WIDE>& of, Ints (&sums)[TALL * SIDE][WIDE]) {
  constexpr size_t VECTOR = Columns<WIDE>::VECTOR;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (size_t u = 0; u < of.units; u += SIDE) {
    const int8_t* columns = u < of.whole ? of.w + u * of.next : of.last;
    const size_t step = u < of.whole ? of.next : WIDE * VECTOR;
    _tile_loadd(6, columns, step);
    _tile_loadd(4, x + u, rows * 4);
    _tile_dpbusd(0, 4, 6);
    if constexpr (WIDE > 1) {
      _tile_loadd(7, columns + VECTOR, step);
      _tile_dpbusd(1, 4, 7);
    }
    if constexpr (TALL > 1) {
      _tile_loadd(5, x + SIDE * rows + u, rows * 4);
      _tile_dpbusd(2, 5, 6);
      if constexpr (WIDE > 1) _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], WIDE * VECTOR);
  if constexpr (WIDE > 1) _tile_stored(1, sums[0] + 1, WIDE * VECTOR);
  if constexpr (TALL > 1) _tile_stored(2, sums[SIDE], WIDE * VECTOR);
  if constexpr (TALL > 1 && WIDE > 1) _tile_stored(3, sums[SIDE] + 1, WIDE * VECTOR);
}
#else
constexpr size_t TALLEST = 1;
struct Matrices {
  static bool allowed() { return false; }
};
#endif

}  // namespace structured
