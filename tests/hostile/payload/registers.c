/* Registers, ports and the space between them, in every size and alignment. */
#include "devices.h"

static const u16 known_ports[] = {
	0x20, 0x21, 0x40, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x80, 0x92, 0xa0, 0xa1, 0x3f8, 0x3f9,
	0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x4d0, 0x4d1, 0xcf8, 0xcf9, 0xcfc, 0xffff,
};

static u16 some_port(struct random *random)
{
	if (one_in(random, 4))
		return next(random);
	return known_ports[below(random, sizeof(known_ports) / 2)] + (one_in(random, 8) ? 1 : 0);
}

static int is_reset(u16 port)
{
	return port >= 0x60 && port <= 0x64;
}

static void touch(u64 gpa, struct random *random)
{
	u64 value = some_number(random);

	switch (below(random, 12)) {
	case 0:
		write8(gpa, value);
		break;
	case 1:
		write16(gpa, value);
		break;
	case 2: case 3: case 4:
		write32(gpa, value);
		break;
	case 5:
		write64(gpa, value);
		break;
	case 6:
		read8(gpa);
		break;
	case 7:
		read16(gpa);
		break;
	case 8: case 9:
		read32(gpa);
		break;
	case 10:
		read64(gpa);
		break;
	default:
		asm volatile("xchgl %k0, (%1)" : "+r"(value) : "r"(gpa) : "memory");
	}
}

/* One window's registers, known and unknown, written in any order. */
void random_registers(struct random *random)
{
	u64 window = devices[below(random, device_count)].window;
	u32 count = 1 + below(random, 16);

	while (count--) {
		u64 gpa = window + (one_in(random, 4) ? below(random, WINDOW_BYTES)
						      : below(random, 0x140) & ~3ul);

		touch(gpa, random);
	}
}

void random_ports(struct random *random)
{
	u32 count = 1 + below(random, 16);

	while (count--) {
		u16 port = some_port(random);
		u64 value = some_number(random);

		if (port == 0x64 && (value & 0xff) == 0xfe)
			value = 0xff;
		if (port == 0x3f8 && !(flags & FLOOD) && !one_in(random, 16))
			port++;	/* the console's file is for what we say */
		switch (below(random, 6)) {
		case 0:
			out8(port, value);
			break;
		case 1:
			out16(port, value);
			break;
		case 2:
			out32(port, value);
			break;
		case 3:
			in8(port);
			break;
		case 4:
			in16(port);
			break;
		default:
			in32(port);
		}
	}
}

/* In strings; but no reset, and more than the console's file takes only where that is wanted. */
static void string_ports(struct random *random)
{
	u16 port = some_port(random);
	u64 count = 1 + below(random, one_in(random, 16) ? 3000 : 64);
	u64 length = 4 * count;
	u64 gpa = some_buffer(random, &length) + below(random, 4);

	if (is_reset(port) || (port == 0x3f8 && !(flags & FLOOD)))
		port = 0x3fd;
	if (gpa + 4 * count > RAM_BYTES)
		return;
	switch (below(random, 6)) {
	case 0:
		ins8(port, gpa, count);
		break;
	case 1:
		ins16(port, gpa, count);
		break;
	case 2:
		ins32(port, gpa, count);
		break;
	case 3:
		outs8(port, gpa, count);
		break;
	case 4:
		outs16(port, gpa, count);
		break;
	default:
		outs32(port, gpa, count);
	}
}

/* Between and behind the windows, over their edges, in strings, into the read-only image. */
void odd_accesses(struct random *random)
{
	u64 window = WINDOWS + WINDOW_BYTES * below(random, WINDOW_COUNT);
	u64 from = window + below(random, 0x200), to = BUFFERS;
	u64 count = 1 + below(random, 64);

	switch (below(random, 7)) {
	case 0:
		touch(window + WINDOW_BYTES - 1 - below(random, 7), random);
		break;
	case 1:
		touch(WINDOWS + below(random, 1 << 24), random);
		break;
	case 2:
		touch(RAM_BYTES - 4 + below(random, 1 << 20), random);
		break;
	case 3:
		touch(IMAGE + below(random, 4 << 20), random);
		break;
	case 4:
		asm volatile("rep movsb" : "+S"(from), "+D"(to), "+c"(count) : : "memory");
		break;
	case 5:
		asm volatile("rep movsl" : "+D"(from), "+S"(to), "+c"(count) : : "memory");
		break;
	default:
		string_ports(random);
	}
}
