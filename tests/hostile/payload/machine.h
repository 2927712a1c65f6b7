/* The machine as the payload sees it: where things stand, and every way to touch them. */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define RAM_BYTES (96ul << 20)
#define LISTS 0x180000ul	/* page numbers for the balloon, where nobody writes over them */
#define LIST_BYTES 0x2000ul
#define ARENAS (16ul << 20)	/* rings and indirect tables, ARENA_BYTES for each queue */
#define ARENA_BYTES (128ul << 10)
#define BUFFERS (32ul << 20)
#define BUFFERS_BYTES (16ul << 20)	/* not all RAM: what was touched takes time to free */
#define LOWEST_TARGET (2ul << 20)	/* below is what the payload itself must keep */
#define WINDOWS 0xd0000000ul
#define WINDOW_BYTES 0x1000ul
#define WINDOW_COUNT 32
#define IOAPIC 0xfec00000ul
#define LAPIC 0xfee00000ul
#define IMAGE (4ul << 30)	/* the first pmem window */
#define TRAMPOLINE_PAGE 8

extern u64 seed;
extern u32 flags;
#define FLOOD 1	/* the console's file may become full */
void triple_fault(void);

#define ACCESS(bits)								\
	static inline u##bits read##bits(u64 gpa)				\
	{									\
		return *(volatile u##bits *)gpa;				\
	}									\
	static inline void write##bits(u64 gpa, u##bits value)			\
	{									\
		*(volatile u##bits *)gpa = value;				\
	}
ACCESS(8)
ACCESS(16)
ACCESS(32)
ACCESS(64)

#define PORT(bits, suffix)							\
	static inline u##bits in##bits(u16 port)				\
	{									\
		u##bits value;							\
		asm volatile("in" suffix " %1, %0" : "=a"(value) : "Nd"(port));	\
		return value;							\
	}									\
	static inline void out##bits(u16 port, u##bits value)			\
	{									\
		asm volatile("out" suffix " %0, %1" : : "a"(value), "Nd"(port)); \
	}									\
	static inline void ins##bits(u16 port, u64 to, u64 count)		\
	{									\
		asm volatile("rep ins" suffix : "+D"(to), "+c"(count)		\
			     : "d"(port) : "memory");				\
	}									\
	static inline void outs##bits(u16 port, u64 from, u64 count)		\
	{									\
		asm volatile("rep outs" suffix : "+S"(from), "+c"(count)	\
			     : "d"(port) : "memory");				\
	}
PORT(8, "b")
PORT(16, "w")
PORT(32, "l")

/* xorshift64* (Vigna 2016); each vCPU has its own. */
struct random {
	u64 state;
};

static inline u64 next(struct random *random)
{
	u64 x = random->state;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	random->state = x;
	return x * 0x2545f4914f6cdd1dul;
}

static inline u64 below(struct random *random, u64 end)
{
	return (next(random) >> 11) % end;
}

static inline int one_in(struct random *random, u64 n)
{
	return below(random, n) == 0;
}

/* Some seeds make a fault with nearly each buffer, others let the devices work for long. */
extern u32 care;
extern u32 heavy;	/* no faults: each request the largest that its device takes */

static inline int fault(struct random *random, u64 n)
{
	return !heavy && one_in(random, n * care);
}
