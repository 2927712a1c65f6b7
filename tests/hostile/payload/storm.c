/*
 * The first vCPU: one idea after the other, each as often as the seed likes it. The test gives
 * orders by the size it asks of the balloon, in MiB, and finds them taken where the guest says how
 * large the balloon is.
 */
#include "devices.h"

enum {
	STORM, NOTIFY_STORM, SPIN, RESET_LINE, TRIPLE_FAULT, RESET_PROCESSOR, SLEEP, INTERRUPTS, TELL,
	HEAVY,
};

#define IDEAS 10
#define MIB_PAGES 256

volatile u32 order, second_may_notify;
u32 care, heavy;
static u64 rounds;

static void restart_second(void)
{
	write32(LAPIC + 0x310, 1u << 24);
	write32(LAPIC + 0x300, 0x4500);	/* INIT */
	write32(LAPIC + 0x310, 1u << 24);
	write32(LAPIC + 0x300, 0x4600 | TRAMPOLINE_PAGE);	/* SIPI */
}

static struct device *some_device(struct random *random)
{
	struct device *device = &devices[below(random, device_count)];

	if (!device->running)
		bring_up(device, random);
	return device;
}

static void offer_to_one(struct random *random)
{
	struct device *device = some_device(random);
	u32 count = 1 + below(random, 16);

	while (count-- && device->running) {
		offer(device, below(random, device->queue_count), random);
		look_after(device);
	}
}

static void reset_during_io(struct random *random)
{
	struct device *device = some_device(random);
	u32 count = 1 + below(random, 4);
	volatile u32 wait = below(random, 1ul << below(random, 16));

	while (count--)
		offer(device, below(random, device->queue_count), random);
	while (wait)
		wait--;
	if (one_in(random, 4))	/* as Linux's virtio-pmem takes its queue */
		write32(device->window + QUEUE_READY, 0);
	write32(device->window + STATUS, 0);
	device->running = 0;
}

static void notify_often(struct random *random)
{
	struct device *device = some_device(random);
	u32 count = 1 + below(random, one_in(random, 16) ? 2048 : 64), queue = below(random, 4);

	while (count--)
		notify(device, one_in(random, 64) ? some_number(random) : queue);
}

static void configurations(struct random *random)
{
	struct device *device = some_device(random);
	u32 count = 1 + below(random, 16);

	while (count--) {
		u64 gpa = device->window + CONFIG + below(random, 0x60);

		if (one_in(random, 2))
			write32(gpa & ~3ul, some_number(random));
		else
			read64(gpa);
	}
}

static void do_idea(u32 idea, struct random *random)
{
	switch (idea) {
	case 0:
		random_registers(random);
		break;
	case 1:
		random_ports(random);
		break;
	case 2:
		odd_accesses(random);
		break;
	case 3:
		reset_during_io(random);
		break;
	case 4:
		notify_often(random);
		break;
	case 5:
		configurations(random);
		break;
	case 6:
		if (one_in(random, 16))
			restart_second();
		break;
	default:
		offer_to_one(random);
	}
}

static void tell(void)
{
	u32 number;

	say("\nSTORM");
	say_number("rounds", rounds);
	say_number("second", second_rounds);
	for (number = 0; number < device_count; number++) {
		struct device *device = &devices[number];

		say_number("\nDEVICE id", device->id);
		say_number("started", device->started);
		say_number("completed", device->completed);
		say_number("stopped", device->stopped);
	}
	say("\nTOLD\n");
}

/* Interrupts of every kind to everybody, which nobody awaits. */
static void interrupts(struct random *random)
{
	u32 count;

	for (count = 0; count < 2000; count++) {
		write32(IOAPIC, below(random, 0x40));
		write32(IOAPIC + 0x10, next(random) & ~0x10000u);
		write32(LAPIC + (below(random, 0x40) << 4), some_number(random));
	}
}

/* All queues full of the most that a device does for one buffer. */
static void heavy_work(struct device *device, struct random *random)
{
	u32 number;

	look_after(device);
	if (!device->running)
		bring_up(device, random);
	for (number = 0; device->running && number < device->queue_count; number++)
		offer(device, number, random);
}

static void answer(u32 wanted)
{
	write32(balloon->window + CONFIG + 4, wanted * MIB_PAGES);
}

static void carry_out(u32 wanted, struct random *random)
{
	u32 number;

	heavy = 1;	/* no more faults */
	for (number = 0; number < device_count; number++)
		if (&devices[number] != balloon && (wanted == NOTIFY_STORM || wanted == HEAVY))
			bring_up(&devices[number], random);
	write32(balloon->window + STATUS, 0);	/* else it may stop and forget what we answer */
	balloon->running = 0;
	answer(wanted);
	second_may_notify = 1;
	switch (wanted) {
	case NOTIFY_STORM:
		for (;;)
			notify(&devices[below(random, device_count)], below(random, 4));
	case HEAVY:
		for (;;) {
			heavy_work(&devices[below(random, device_count)], random);
			answer(wanted);
		}
	case SPIN:
		for (;;)
			;
	case RESET_LINE:
		out8(0x64, 0xfe);
		break;
	case TRIPLE_FAULT:
		triple_fault();
		break;
	case RESET_PROCESSOR:	/* there is nothing at the reset vector */
		write32(LAPIC + 0x310, 0);
		write32(LAPIC + 0x300, 0x4500);
		break;
	case SLEEP:	/* the second one waits for a SIPI, and nobody else is there to send it */
		write32(LAPIC + 0x310, 1u << 24);
		write32(LAPIC + 0x300, 0x4500);
		for (;;)
			asm volatile("pause");
	case INTERRUPTS:
		interrupts(random);
		break;
	}
	for (;;)
		;
}

static void take_orders(struct random *random)
{
	static u32 done;
	u32 wanted = read32(balloon->window + CONFIG) / MIB_PAGES;

	if (wanted == done)
		return;
	done = wanted;
	if (wanted == TELL)
		tell();
	else if (wanted) {
		order = wanted;
		while (!second_obeys)	/* what it was doing could undo what is next */
			;
		carry_out(wanted, random);
	}
}

void storm(void)
{
	struct random random = { seed | 1ul << 63 };
	u32 weights[IDEAS], total = 0, idea, chosen;

	care = 1u << below(&random, 8);
	for (idea = 0; idea < IDEAS; idea++) {
		weights[idea] = 1 + (below(&random, 16) >> (idea < 7));
		total += weights[idea];
	}
	find_devices();
	say("\nBEGUN\n");
	for (;;) {
		chosen = below(&random, total);
		for (idea = 0; chosen >= weights[idea]; idea++)
			chosen -= weights[idea];
		do_idea(idea, &random);
		rounds++;
		take_orders(&random);
	}
}
