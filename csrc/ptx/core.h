// The machine of sm_80 and later behind names: every asm statement of the kernels is in this folder.
//
// Shared memory is addressed by 32-bit byte offsets within the shared window, as ldmatrix and cp.async want it.
#pragma once

#include <cstdint>

namespace lk {

// 16 bytes in registers.
struct alignas(16) Vec16 {
  uint32_t word[4];
};

struct alignas(8) Float2 {
  float x, y;
};

LK_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
LK_DEVICE uint32_t bits_of(float f) { return __float_as_uint(f); }
LK_DEVICE uint32_t count_ones(uint32_t bits) { return static_cast<uint32_t>(__popc(bits)); }

// Byte i of the result is, of the eight bytes of `low` and `high`, the one that four bits of the selector, from bit 4 i
// on, say. The highest of these must be zero.
LK_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t permuted;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(permuted) : "r"(low), "r"(high), "r"(selector));
  return permuted;
}

// Two operations on fp32 that the compiler never makes one of (fma), so that each rounds.
LK_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
LK_DEVICE float rounded_sum(float a, float b) { return __fadd_rn(a, b); }

LK_DEVICE float exponential(float f) { return expf(f); }
LK_DEVICE float complementary_error(float f) { return erfcf(f); }

// The same number, in a register: the compiler does not see that it is a parameter of the kernel, which it would use
// from where parameters are, and then, where registers are scarce, spill another one.
LK_DEVICE float in_register(float f) {
  float same;
  asm("add.f32 %0, %1, 0f80000000;" : "=f"(same) : "f"(f));  // -0
  return same;
}

// ------------------------------------------------------------------------------------------------ the thread

LK_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
LK_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
LK_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

LK_DEVICE void sync_block() { __syncthreads(); }
LK_DEVICE void sync_warp() { __syncwarp(); }

// Bit i: whether lane i said true. All lanes of the warp call it.
LK_DEVICE uint32_t warp_ballot(bool flag) { return __ballot_sync(0xFFFFFFFFu, flag); }

// Ends the launch with an error.
LK_DEVICE void trap() { __trap(); }

// Address of the block's dynamic shared memory: a multiple of this, so that swizzled rows begin at bank 0, and that an
// exclusive or with a part of a row's length stays within the row (OperandTile).
constexpr int kDynamicSharedAlignment = 1024;

LK_DEVICE uint32_t dynamic_shared() {
  extern __shared__ __align__(kDynamicSharedAlignment) unsigned char dynamic_shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
}

// ---------------------------------------------------------------------------------------------------- memory

template <class T>
LK_DEVICE T load_global(const T* p) {
  return *p;
}

template <class T>
LK_DEVICE void store_global(T* p, T value) {
  *p = value;
}

// The compiler would store the words of these one by one.
LK_DEVICE void store_global(Float2* p, Float2 value) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(value.x), "f"(value.y) : "memory");
}

LK_DEVICE void store_global(Vec16* p, Vec16 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(value.word[0]), "r"(value.word[1]),
               "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}

LK_DEVICE Vec16 load_shared_16(uint32_t address) {
  Vec16 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(address));
  return v;
}

LK_DEVICE uint64_t load_shared_8(uint32_t address) {
  uint64_t v;
  asm volatile("ld.shared.b64 %0, [%1];" : "=l"(v) : "r"(address));
  return v;
}

LK_DEVICE uint32_t load_shared_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

LK_DEVICE void store_shared_16(uint32_t address, const Vec16& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

LK_DEVICE void store_shared_8(uint32_t address, Float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

LK_DEVICE void store_shared_4(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// Copies 16 bytes, of which `bytes` (0..16) come from `source` and the rest are zero. Lands with the wait for its
// group.
LK_DEVICE void copy_async_16(uint32_t address, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
}

// The same of 8 bytes, which only a copy by way of the L1 cache can be.
LK_DEVICE void copy_async_8(uint32_t address, const void* source, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
}

LK_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
LK_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ------------------------------------------------------------------------------------- between blocks: flags

LK_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t value) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
}

// What this thread has seen before (after a block barrier: what its block has written) is visible to whoever acquires.
LK_DEVICE uint32_t atomic_add_acquire_release(uint32_t* p, uint32_t value) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
}

LK_DEVICE void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

LK_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Between two polls of a flag.
LK_DEVICE void pause() { __nanosleep(40); }

// ---------------------------------------------------------------------------------------------- tensor cores

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
LK_DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

// The same, each matrix transposed.
LK_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

struct BFloat16 {
  using Storage = uint16_t;

  // Two floats rounded to nearest even, `low` in the low half.
  LK_DEVICE static uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }

  LK_DEVICE static float low(uint32_t packed) { return __uint_as_float(packed << 16); }
  LK_DEVICE static float high(uint32_t packed) { return __uint_as_float(packed & 0xFFFF0000u); }

  // d[16, 8] += a[16, 16] b[16, 8] in the fragment layouts of mma.m16n8k16.
  LK_DEVICE static void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Float16 {
  using Storage = uint16_t;

  LK_DEVICE static uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }

  LK_DEVICE static float low(uint32_t packed) {
    float f;
    asm("{.reg .b16 l, h;\n mov.b32 {l, h}, %1;\n cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(packed));
    return f;
  }

  LK_DEVICE static float high(uint32_t packed) {
    float f;
    asm("{.reg .b16 l, h;\n mov.b32 {l, h}, %1;\n cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(packed));
    return f;
  }

  LK_DEVICE static void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// fp32 in memory, multiplied in tf32.
struct TensorFloat32 {
  using Storage = uint32_t;

  // To nearest, ties away from zero, as an operand of multiply_add.
  LK_DEVICE static uint32_t round(uint32_t bits) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
  }

  LK_DEVICE static float low(uint32_t bits) { return __uint_as_float(bits); }

  // d[16, 8] += a[16, 8] b[8, 8] in the fragment layouts of mma.m16n8k8.
  LK_DEVICE static void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

}  // namespace lk
