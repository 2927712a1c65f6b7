/* For each kind of device a request it would serve, with random fields where that gets further. */
#include "devices.h"

static struct descriptor piece(u64 gpa, u64 length, u32 flags)
{
	struct descriptor made = { gpa, length, flags, 0 };

	return made;
}

static struct descriptor room(struct random *random, u64 length, u32 flags)
{
	u64 gpa = some_buffer(random, &length);

	return piece(gpa, length, flags);
}

static u64 some_length(struct random *random)
{
	u64 length = 1 + below(random, 4096);

	if (heavy)
		return 65536 - 64;
	return one_in(random, 8) ? length << below(random, 7) : length;
}

static u32 block(struct descriptor *pieces, struct random *random)
{
	static const u32 kinds[] = { 0, 0, 0, 1, 1, 1, 4, 8, 11, 13 };
	u32 kind = kinds[below(random, 10)], count, place;
	u64 gpa, shift = below(random, 14);

	if (heavy)
		kind = one_in(random, 4) ? 13 : 1;
	pieces[0] = room(random, 16, 0);
	gpa = pieces[0].gpa;
	write32(gpa, fault(random, 8) ? some_number(random) : kind);
	write32(gpa + 4, next(random));
	write64(gpa + 8, fault(random, 4) ? some_number(random) : below(random, 2048));
	count = 1 + below(random, 6);
	if (heavy && kind == 1) {	/* as much as the disk has */
		write64(gpa + 8, 0);
		pieces[1] = room(random, 1 << 20, 0);
		pieces[2] = room(random, 1, LINK_WRITE);
		return 3;
	}
	for (place = 1; place <= count; place++) {
		u64 length = 512ul << (one_in(random, 16) ? shift : below(random, 5));

		pieces[place] = room(random, length, kind == 0 ? LINK_WRITE : 0);
	}
	if (kind == 4)
		count = 0;
	if (kind == 8) {
		count = 1;
		pieces[1] = room(random, 20, LINK_WRITE);
	}
	if (kind > 8) {
		count = 1;
		pieces[1] = room(random, 16, 0);
		write64(pieces[1].gpa, one_in(random, 8) ? some_number(random) : below(random, 2048));
		write32(pieces[1].gpa + 8, one_in(random, 8) ? some_number(random)
							      : below(random, 256));
		write32(pieces[1].gpa + 12, one_in(random, 8) ? next(random) : below(random, 2));
	}
	pieces[count + 1] = room(random, 1, LINK_WRITE);
	return count + 2;
}

static u32 frame(struct device *device, struct descriptor *pieces, struct random *random)
{
	u64 length = heavy ? 65000 : 26 + below(random, one_in(random, 8) ? 66000 : 1500);
	u64 gpa, place;
	u32 cut = 12 + below(random, length - 12), count = 0;

	pieces[0] = room(random, length, 0);
	gpa = pieces[0].gpa;
	write64(gpa, one_in(random, 4) ? some_number(random) : 0);
	if (one_in(random, 4)) {	/* cut and summed up by the host */
		write8(gpa, 1);
		write8(gpa + 1, one_in(random, 8) ? next(random) : one_in(random, 2) ? 1 : 4);
		write16(gpa + 2, 54);
		write16(gpa + 4, some_number(random));
		write16(gpa + 6, 34);
	}
	write32(gpa + 8, one_in(random, 4) ? some_number(random) : 16);
	for (place = 0; place < 6; place++) {
		write8(gpa + 12 + place, 0xff);
		write8(gpa + 18 + place, device->config >> 8 * place);
	}
	write16(gpa + 24, one_in(random, 2) ? 0x0008 : 0x0608);
	if (one_in(random, 2) && cut > 0 && cut < length) {	/* header and frame apart, or not */
		pieces[1] = piece(gpa + cut, length - cut, 0);
		pieces[0].length = cut;
		count++;
	}
	return count + 1;
}

static u32 packet(struct device *device, struct descriptor *pieces, struct random *random)
{
	u64 length = one_in(random, 2) && !heavy ? 0 : some_length(random), gpa;

	pieces[0] = room(random, 44 + length, 0);
	gpa = pieces[0].gpa;
	write64(gpa, fault(random, 16) ? some_number(random) : device->config);
	write64(gpa + 8, fault(random, 16) ? some_number(random) : 2);
	write32(gpa + 16, 5000 + below(random, 4));
	write32(gpa + 20, fault(random, 4) ? some_number(random) : 1024 + below(random, 4));
	write32(gpa + 24, fault(random, 16) ? some_number(random) : length);
	write16(gpa + 28, fault(random, 16) ? next(random) : 1);
	write16(gpa + 30, fault(random, 8) ? next(random) : 1 + below(random, 7));
	write32(gpa + 32, one_in(random, 8) ? next(random) : below(random, 4));
	write32(gpa + 36, one_in(random, 4) ? some_number(random) : 65536);
	write32(gpa + 40, one_in(random, 4) ? some_number(random) : 0);
	return 1;
}

static u32 pages(struct descriptor *pieces, struct random *random)
{
	u32 count = heavy ? 256 : 1 + below(random, one_in(random, 8) ? 300 : 64), place;
	u32 page = (BUFFERS >> 12) + below(random, 1000);

	/* A page of the payload's own would be the end of it. */
	pieces[0] = piece(LISTS + LIST_BYTES * below(random, 64), 4 * count, 0);
	for (place = 0; place < count; place++) {
		u64 gpa = some_gpa(random) >> 12;

		write32(pieces[0].gpa + 4 * place, fault(random, 64) ? gpa : page);
		page += 1 + below(random, 4);
	}
	return 1;
}

static u32 file_system(struct descriptor *pieces, struct random *random)
{
	u64 body = below(random, 256);

	pieces[0] = room(random, 40 + body, 0);
	write32(pieces[0].gpa, fault(random, 4) ? some_number(random) : 40 + body);
	write32(pieces[0].gpa + 4, one_in(random, 4) ? 26 : below(random, 64));	/* FUSE_INIT */
	write64(pieces[0].gpa + 8, next(random));
	write64(pieces[0].gpa + 16, 1);
	write32(pieces[0].gpa + 40, 7);
	write32(pieces[0].gpa + 44, 31);
	pieces[1] = room(random, 16 + some_length(random), LINK_WRITE);
	return 2;
}

/* The pieces of one buffer for this queue, fewer than MAX_PIECES; links are not set. */
u32 request(struct device *device, u32 number, struct descriptor *pieces, struct random *random)
{
	switch (device->id) {
	case ID_BLOCK:
		return block(pieces, random);
	case ID_NET:
		if (number == 1)
			return frame(device, pieces, random);
		pieces[0] = room(random, one_in(random, 4) ? 12 + below(random, 2000) : 73728,
				 LINK_WRITE);
		return 1;
	case ID_SOCKET:
		if (number == 1)
			return packet(device, pieces, random);
		pieces[0] = room(random, number ? 8 : 3776, LINK_WRITE);
		return 1;
	case ID_BALLOON:
		if (number < 2)
			return pages(pieces, random);
		pieces[0] = room(random, 4096ul << (heavy ? 12 : below(random, 11)), LINK_WRITE);
		return 1;
	case ID_FS:
		return file_system(pieces, random);
	case ID_PMEM:
		pieces[0] = room(random, 4, 0);
		write32(pieces[0].gpa, one_in(random, 4) ? next(random) : 0);
		pieces[1] = room(random, 4, LINK_WRITE);
		return 2;
	}
	pieces[0] = room(random, some_length(random), LINK_WRITE);
	pieces[1] = room(random, 1 + below(random, 64), LINK_WRITE);
	return 1 + one_in(random, 4);
}
