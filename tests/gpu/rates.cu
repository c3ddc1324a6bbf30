// How many cycles a scheduler spends on an instruction of one warp: what docs/kernels.md reckons with.
//     nvcc -O3 -arch=sm_90 -o rates tests/gpu/rates.cu && ./rates
#include <cstdio>

constexpr int CHAINS = 8, TURNS = 1024;  // independent chains of a warp, and instructions in each

#define EACH(...) for (int i = 0; i < TURNS / 4; i++) { _Pragma("unroll") for (int k = 0; k < 4; k++) { _Pragma("unroll") for (int j = 0; j < CHAINS; j++) { __VA_ARGS__; } } }
#define THREE(name) asm volatile(name " %0,%0,%1,%2;" : "+r"(x[j]) : "r"(a), "r"(b))
#define LOP asm volatile("lop3.b32 %0,%0,%1,%2,0x96;" : "+r"(x[j]) : "r"(a), "r"(b))
#define MMA(c) asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%4,%5,%5},{%4,%5},{%0,%1,%2,%3};" \
    : "+f"(f[c]), "+f"(f[c + 1]), "+f"(f[c + 2]), "+f"(f[c + 3]) : "r"(a), "r"(b))

template <int CASE> __global__ void run(unsigned* out, long long* cycles, unsigned a, unsigned b) {
  unsigned x[CHAINS];
  float f[4 * CHAINS];
  for (int j = 0; j < CHAINS; j++) x[j] = threadIdx.x * j + a;
  for (int j = 0; j < 4 * CHAINS; j++) f[j] = j;
  __syncthreads();
  long long start = clock64();
  if (CASE == 0) EACH(THREE("prmt.b32"))
  if (CASE == 1) EACH(LOP)
  if (CASE == 2) EACH(THREE("shf.l.wrap.b32"))
  if (CASE == 3) EACH(THREE("mad.lo.u32"))
  if (CASE == 4) EACH(THREE("fma.rn.f16x2"))
  if (CASE == 5) EACH(MMA(4 * j))
  if (CASE == 6) EACH(MMA(0))
  if (CASE == 7) EACH(if (j & 1) THREE("prmt.b32"); else THREE("fma.rn.f16x2"))
  if (CASE == 8) EACH(if (j & k & 1) MMA(4 * j); else THREE("prmt.b32"))
  long long end = clock64();
  unsigned sum = 0;
  float total = 0;
  for (int j = 0; j < CHAINS; j++) sum ^= x[j];
  for (int j = 0; j < 4 * CHAINS; j++) total += f[j];
  out[threadIdx.x] = sum + (unsigned)total;
  if (threadIdx.x == 0) *cycles = end - start;
}

template <int CASE> void measure(const char* name) {
  unsigned* out;
  long long *cycles, host;
  cudaMalloc(&out, 8192);
  cudaMalloc(&cycles, sizeof host);
  for (int warps : {4, 8, 12, 16}) {
    for (int i = 0; i < 2; i++) run<CASE><<<1, 32 * warps>>>(out, cycles, 3, 5);
    cudaMemcpy(&host, cycles, sizeof host, cudaMemcpyDeviceToHost);
    printf("%-24s %2d warps a multiprocessor: %.2f cycles\n", name, warps, (double)host / (TURNS * CHAINS) / (warps / 4));
  }
}

int main() {
  measure<0>("prmt");
  measure<1>("lop3");
  measure<2>("shf");
  measure<3>("imad");
  measure<4>("hfma2");
  measure<5>("mma, 8 chains");
  measure<6>("mma, one chain");
  measure<7>("prmt and hfma2 in turn");
  measure<8>("three prmt, then mma");
}
