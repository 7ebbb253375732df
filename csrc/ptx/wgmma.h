// Products of warpgroups on sm_90a: four warps multiply operands in shared memory, and go on meanwhile. And what else
// only warpgroups do.
#pragma once

#include <cstdint>

namespace lk {

constexpr int kWarpgroup = 128;

// Lane 0's value, of whole warps: the compiler knows that it is the warp's.
LK_DEVICE uint32_t broadcast(uint32_t value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

// So many registers a thread from here on, of all threads of a warpgroup; those of all warpgroups together come from
// what the launch has given to the block, or whoever claims waits for ever.
template <int kRegisters>
LK_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
LK_DEVICE void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8x8 matrices of 16-bit elements, in registers as mma's accumulators lie, to shared memory; lane i gives the
// address of row i % 8 of matrix i / 8.
LK_DEVICE void store_matrix_x4(uint32_t row_address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// In front of the first product of a group whose registers this thread has touched.
LK_DEVICE void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last one are a group.
LK_DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending groups are under way. Accumulators of those that are not may be read, and operands
// overwritten.
template <int kPending, int kCount>
LK_DEVICE void multiply_wait(float (&d)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  // Nothing else keeps the compiler from reading them before.
  LK_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The same, where no accumulator is read behind it.
template <int kPending>
LK_DEVICE void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// How an operand lies in shared memory. In rows of 128 or 32 bytes along the depth, swizzled: eight rows, `stride`
// bytes, then the next eight. Transposed, the rows of memory lie along the operand's rows, and are panels, `lead` bytes
// apart.
template <int kRowBytes = 128>
LK_DEVICE uint64_t matrix_descriptor(uint32_t address, int lead, int stride) {
  static_assert(kRowBytes == 128 || kRowBytes == 32);
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 3;
  return (address & 0x3FFFF) >> 4 | static_cast<uint64_t>(lead >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         kSwizzle << 62;
}

// Names of the accumulators in a statement, and the accumulators.
#define LK_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LK_NAMES_16 LK_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LK_NAMES_32 \
  LK_NAMES_16       \
  ", "              \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LK_NAMES_64                                                                                      \
  LK_NAMES_32                                                                                            \
  ", "                                                                                                   \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LK_NAMES_128                                                                                     \
  LK_NAMES_64                                                                                            \
  ", "                                                                                                   \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "   \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, "     \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LK_REGISTERS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LK_REGISTERS_8(i) LK_REGISTERS_4(i), LK_REGISTERS_4(i + 4)
#define LK_REGISTERS_16(i) LK_REGISTERS_8(i), LK_REGISTERS_8(i + 8)
#define LK_REGISTERS_32(i) LK_REGISTERS_16(i), LK_REGISTERS_16(i + 16)
#define LK_REGISTERS_64(i) LK_REGISTERS_16(i), LK_REGISTERS_16(i + 16), LK_REGISTERS_16(i + 32), LK_REGISTERS_16(i + 48)
#define LK_REGISTERS_128(i) LK_REGISTERS_64(i), LK_REGISTERS_64(i + 64)

// The operands behind the accumulators follow them in number.
#define LK_MULTIPLY_ADD_ASYNC(columns, count, type, p_name, q_name, accumulates_name, p_turned, q_turned)     \
  template <bool kTransposedQ, bool kTransposedP = false>                                                     \
  LK_DEVICE static void multiply_add_async(float(&d)[count], uint64_t p, uint64_t q, bool accumulates) {      \
    asm volatile("{.reg .pred a;\n setp.ne.b32 a, " accumulates_name                                          \
                 ", 0;\n"                                                                                     \
                 " wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" LK_NAMES_##count \
                 "}, " p_name ", " q_name ", a, 1, 1, " p_turned ", " q_turned ";}"                           \
                 : LK_REGISTERS_##count(0)                                                                    \
                 : "l"(p), "l"(q), "r"(static_cast<uint32_t>(accumulates)), "n"(kTransposedP ? 1 : 0),        \
                   "n"(kTransposedQ ? 1 : 0));                                                                \
  }
#define LK_MULTIPLY_ADDS(type)                                            \
  LK_MULTIPLY_ADD_ASYNC(16, 8, type, "%8", "%9", "%10", "%11", "%12")     \
  LK_MULTIPLY_ADD_ASYNC(32, 16, type, "%16", "%17", "%18", "%19", "%20")  \
  LK_MULTIPLY_ADD_ASYNC(64, 32, type, "%32", "%33", "%34", "%35", "%36")  \
  LK_MULTIPLY_ADD_ASYNC(128, 64, type, "%64", "%65", "%66", "%67", "%68") \
  LK_MULTIPLY_ADD_ASYNC(256, 128, type, "%128", "%129", "%130", "%131", "%132")

// d[64, n] += p[64, 16] q[n, 16]T, or = where nothing is accumulated; operands by descriptors. Warp i of the group has
// rows 16 i to 16 i + 15 of d, as mma.m16n8's accumulators lie, eight columns after the other.
template <class Element>
struct Warpgroup;
template <>
struct Warpgroup<BFloat16> {
  LK_MULTIPLY_ADDS("bf16")
};
template <>
struct Warpgroup<Float16> {
  LK_MULTIPLY_ADDS("f16")
};

#undef LK_MULTIPLY_ADDS
#undef LK_MULTIPLY_ADD_ASYNC
#undef LK_REGISTERS_128
#undef LK_REGISTERS_64
#undef LK_REGISTERS_32
#undef LK_REGISTERS_16
#undef LK_REGISTERS_8
#undef LK_REGISTERS_4
#undef LK_NAMES_128
#undef LK_NAMES_64
#undef LK_NAMES_32
#undef LK_NAMES_16
#undef LK_NAMES_8

}  // namespace lk
