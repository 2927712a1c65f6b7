/* Buffers into a queue: mostly a request that its device knows, with one fault in some of them. */
#include "devices.h"

static void spoil(struct descriptor *pieces, u32 count, u32 size, struct random *random)
{
	struct descriptor *piece = &pieces[below(random, count)];

	switch (below(random, 8)) {
	case 0:
		piece->gpa = some_gpa(random);
		break;
	case 1:
		piece->length = some_number(random);
		break;
	case 2:
		piece->flags = next(random);
		break;
	case 3:	/* a loop, or out of the table */
		piece->flags |= LINK_NEXT;
		piece->next = one_in(random, 2) ? some_number(random) : below(random, size + 1);
		break;
	case 4:
		piece->flags ^= LINK_WRITE;
		break;
	case 5:	/* over the end of RAM */
		piece->gpa = RAM_BYTES - below(random, piece->length + 1ul);
		break;
	case 6:	/* over itself: the rings are the buffer */
		piece->gpa = ARENAS + below(random, MAX_DEVICES * MAX_QUEUES * ARENA_BYTES);
		break;
	default:
		*piece = some_descriptor(random, size);
	}
}

static void link(struct descriptor *pieces, u32 count, u32 first, u32 size)
{
	u32 place;

	for (place = 0; place < count; place++) {
		pieces[place].next = (first + place + 1) % size;
		if (place + 1 < count)
			pieces[place].flags |= LINK_NEXT;
	}
}

static void copy(struct descriptor *to, const struct descriptor *from)
{
	u64 *words = (u64 *)to;
	const u64 *source = (const u64 *)from;

	write64((u64)words, source[0]);
	write64((u64)(words + 1), source[1]);
}

/* The pieces as a table of its own, and one descriptor that points there; some are no good. */
static struct descriptor indirect(struct queue *queue, struct descriptor *pieces, u32 count,
				  struct random *random)
{
	struct descriptor made;
	u64 at = indirect_table(queue, queue->descriptors);
	u32 place;

	link(pieces, count, 0, count);
	if (fault(random, 4))
		spoil(pieces, count, count, random);
	if (fault(random, 16))	/* nested */
		pieces[below(random, count)].flags |= LINK_INDIRECT;
	for (place = 0; place < count; place++)
		copy((struct descriptor *)at + place, &pieces[place]);
	made.gpa = fault(random, 16) ? some_gpa(random) : at;
	made.length = 16 * count;
	if (fault(random, 16))
		made.length = one_in(random, 2) ? some_number(random) : made.length - 1;
	made.flags = LINK_INDIRECT | (fault(random, 16) ? below(random, 4) : 0);
	made.next = 0;
	return made;
}

static void make_available(struct queue *queue, u32 head, struct random *random)
{
	u64 ring = driver_ring(queue) + 4;

	if (fault(random, 32))
		head = some_number(random);
	write16(ring + 2 * (queue->available & (queue->size - 1)), head);
	queue->available++;
}

static void offer_one(struct device *device, u32 number, struct random *random)
{
	struct queue *queue = &device->queues[number];
	struct descriptor pieces[MAX_PIECES];
	u32 count = request(device, number, pieces, random);
	u32 first = queue->descriptors % queue->size, place;

	if (fault(random, 16))
		count = MAX_PIECES;	/* many more, whatever stood there */
	for (place = 0; count == MAX_PIECES && place < count; place++)
		pieces[place] = some_descriptor(random, queue->size);
	if ((device->features & F_INDIRECT && one_in(random, 2)) || count > queue->size ||
	    fault(random, 32)) {
		pieces[0] = indirect(queue, pieces, count, random);
		count = 1;
	} else {
		link(pieces, count, first, queue->size);
	}
	if (fault(random, 4))
		spoil(pieces, count, queue->size, random);
	for (place = 0; place < count; place++)
		copy(table(queue) + (first + place) % queue->size, &pieces[place]);
	queue->descriptors += count;
	make_available(queue, first, random);
}

void offer(struct device *device, u32 number, struct random *random)
{
	struct queue *queue = &device->queues[number];
	u32 count = heavy ? queue->size : 1 + below(random, one_in(random, 8) ? queue->size : 4);

	if (!queue->size)
		return;
	while (count--) {
		u16 pending = queue->available - read16(device_ring(queue) + 2);

		if (pending >= queue->size && !fault(random, 16))
			break;
		offer_one(device, number, random);
	}
	if (fault(random, 32))
		queue->available += some_number(random);
	write16(driver_ring(queue), one_in(random, 8) ? next(random) : 0);	/* flags */
	write16(driver_ring(queue) + 2, queue->available);
	write16(driver_ring(queue) + 4 + 2 * queue->size,
		one_in(random, 8) ? next(random) : queue->available);
	notify(device, number);
}
