/* Values that programs stumble over. */
#include "devices.h"

u64 some_number(struct random *random)
{
	u64 x = next(random);

	switch (below(random, 8)) {
	case 0:
		return below(random, 8);
	case 1:
		return (1ul << (x & 63)) + below(random, 3) - 1;
	case 2:
		return x & 0xff;
	case 3:
		return x & 0xffff;
	case 4:
		return 0xffffffff - below(random, 4);
	case 5:
		return x & 0xffffffff;
	case 6:
		return -below(random, 4096);
	}
	return x;
}

/* An address; one in RAM is above what the payload itself needs. */
u64 some_gpa(struct random *random)
{
	u64 gpa;

	switch (below(random, 10)) {
	case 0:
		gpa = RAM_BYTES - below(random, 8192);
		break;
	case 1:
		gpa = RAM_BYTES + below(random, 1 << 20);
		break;
	case 2:
		gpa = WINDOWS + below(random, WINDOW_COUNT * WINDOW_BYTES);
		break;
	case 3:
		gpa = IMAGE + below(random, 4 << 20) - 4096;
		break;
	case 4:
		gpa = (one_in(random, 2) ? LAPIC : IOAPIC) + below(random, 4096);
		break;
	case 5:
		gpa = ARENAS + below(random, MAX_DEVICES * MAX_QUEUES * ARENA_BYTES);
		break;
	case 6:
		gpa = some_number(random);
		break;
	default:
		gpa = LOWEST_TARGET + below(random, RAM_BYTES - LOWEST_TARGET);
	}
	if (one_in(random, 4))
		gpa &= ~4095ul;
	return gpa < LOWEST_TARGET ? gpa + LOWEST_TARGET : gpa;
}

/* A place for `*length` bytes among the buffers. */
u64 some_buffer(struct random *random, u64 *length)
{
	if (*length > BUFFERS_BYTES)
		*length = BUFFERS_BYTES;
	return BUFFERS + (below(random, BUFFERS_BYTES - *length + 1) & ~15ul);
}

struct descriptor some_descriptor(struct random *random, u32 size)
{
	struct descriptor made;

	made.gpa = some_gpa(random);
	made.length = some_number(random);
	made.flags = one_in(random, 8) ? next(random) : below(random, 8);
	made.next = one_in(random, 4) ? some_number(random) : below(random, size + 1);
	return made;
}
