/* The second vCPU: it rewrites what the devices are reading. */
#include "devices.h"

#define FLIPS 256

volatile u32 second_rounds, second_obeys;

static struct queue *some_queue(struct random *random)
{
	struct device *device = &devices[below(random, device_count)];

	return &device->queues[below(random, device->queue_count)];
}

/* A descriptor that is now this, now that: checked as one and used as the other, if read twice. */
static void flip(struct queue *queue, struct random *random)
{
	struct descriptor *at = table(queue) + below(random, queue->size);
	u64 gpa = read64((u64)at), rest = read64((u64)at + 8);
	struct descriptor other = some_descriptor(random, queue->size);
	u32 count, what = below(random, 4);

	for (count = 0; count < FLIPS; count++) {
		if (what & 1)
			write64((u64)at, count & 1 ? gpa : other.gpa);
		if (what & 2)
			write32((u64)at + 8, count & 1 ? (u32)rest : other.length);
		if (!what)
			write16((u64)at + 12, count & 1 ? rest >> 32 : other.flags);
	}
}

/* The same with the index that says how much there is to do. */
static void flip_index(struct queue *queue, struct random *random)
{
	u64 gpa = driver_ring(queue) + 2;
	u16 index = read16(gpa), other = one_in(random, 8) ? next(random) : index + 1;
	u32 count;

	for (count = 0; count < FLIPS; count++)
		write16(gpa, count & 1 ? index : other);
	write16(gpa, index);
}

/* Headers and tables among the buffers, wherever a request may have its own. */
static void scribble(struct queue *queue, struct random *random)
{
	u64 length = 64, gpa = indirect_table(queue, next(random)) + 8 * below(random, 64);

	if (one_in(random, 2))
		gpa = some_buffer(random, &length);
	write64(gpa, one_in(random, 2) ? some_gpa(random) : some_number(random));
}

static void meddle(struct random *random)
{
	struct queue *queue = some_queue(random);
	struct device *device = &devices[below(random, device_count)];
	struct descriptor other;

	if (!queue->size)
		return;
	switch (below(random, 16)) {
	case 0:
		other = some_descriptor(random, queue->size);
		write64((u64)(table(queue) + below(random, queue->size)), other.gpa);
		break;
	case 1:
		write16(driver_ring(queue) + 4 + 2 * below(random, queue->size),
			below(random, queue->size + 1));
		break;
	case 2:
		write16(driver_ring(queue) + 2, queue->available + below(random, 4));
		break;
	case 3: case 4: case 5: case 6:
		flip(queue, random);
		break;
	case 7: case 8: case 9:
		flip_index(queue, random);
		break;
	case 10:
		if (one_in(random, 32))	/* in the middle of whatever it does */
			write32(device->window + STATUS, 0);
		break;
	case 11:
		notify(device, below(random, 4));
		break;
	case 12:
		read32(device->window + INTERRUPT_STATUS);
		write32(device->window + INTERRUPT_ACK, 3);
		break;
	default:
		scribble(queue, random);
	}
}

static void obey(struct random *random)
{
	while (order != 1 || !second_may_notify)
		asm volatile("pause");
	for (;;)
		notify(&devices[below(random, device_count)], below(random, 4));
}

void second(void)
{
	/* Begun anew by each INIT, with other numbers each time. */
	static u64 starts;
	struct random random = { seed * 0x9e3779b97f4a7c15ul + ++starts };
	u32 quiet = 6 + 2 * (seed >> 2 & 7);	/* from ten of them in a microsecond to one in some ms */
	volatile u32 wait;

	while (!found_devices)
		;
	for (;;) {
		second_rounds++;
		if (order) {
			second_obeys = 1;
			obey(&random);
		}
		meddle(&random);
		for (wait = below(&random, 1ul << quiet); wait; wait--)
			;
	}
}
