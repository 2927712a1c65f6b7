/* Devices brought up as a driver does it, but for a slip now and then. */
#include "devices.h"

struct device devices[MAX_DEVICES];
u32 device_count;
volatile u32 found_devices;
struct device *balloon;

static u32 queues_of(u32 id)
{
	switch (id) {
	case ID_NET: case ID_FS:
		return 2;
	case ID_SOCKET: case ID_BALLOON:
		return 3;
	}
	return 1;
}

void find_devices(void)
{
	u32 number, queue;

	for (number = 0; number < WINDOW_COUNT && device_count < MAX_DEVICES; number++) {
		struct device *device = &devices[device_count];

		device->window = WINDOWS + WINDOW_BYTES * number;
		if (read32(device->window) != 0x74726976)
			continue;	/* nothing there: reads as ones */
		device->id = read32(device->window + DEVICE_ID);
		device->queue_count = queues_of(device->id);
		for (queue = 0; queue < MAX_QUEUES; queue++)
			device->queues[queue].arena =
				ARENAS + ARENA_BYTES * (MAX_QUEUES * device_count + queue);
		if (device->id == ID_BALLOON)
			balloon = device;
		device_count++;
	}
	found_devices = 1;
}

static u64 read_features(u64 window)
{
	u64 low;

	write32(window + DEVICE_FEATURES_SELECT, 0);
	low = read32(window + DEVICE_FEATURES);
	write32(window + DEVICE_FEATURES_SELECT, 1);
	return low | (u64)read32(window + DEVICE_FEATURES) << 32;
}

static void write_address(u64 gpa, u64 value)
{
	write32(gpa, value);
	write32(gpa + 4, value >> 32);
}

static void set_up_queue(struct device *device, u32 number, struct random *random)
{
	struct queue *queue = &device->queues[number];
	u64 window = device->window, parts[3];
	u32 size, part;

	write32(window + QUEUE_SELECT, fault(random, 32) ? some_number(random) : number);
	size = read32(window + QUEUE_SIZE_MAX);
	if (size > 1024)
		size = 1;
	size >>= heavy || one_in(random, 2) ? 0 : below(random, 9);
	queue->size = size ? size : 1;
	queue->available = queue->used = 0;
	queue->descriptors = 0;
	write32(driver_ring(queue), 0);
	write32(device_ring(queue), 0);
	parts[0] = queue->arena;
	parts[1] = driver_ring(queue);
	parts[2] = device_ring(queue);
	for (part = 0; part < 3; part++)
		if (fault(random, 24))
			parts[part] = one_in(random, 2) ? some_gpa(random) : parts[part] + 1;
	write32(window + QUEUE_SIZE, fault(random, 24) ? some_number(random) : queue->size);
	write_address(window + QUEUE_DESCRIPTOR, parts[0]);
	write_address(window + QUEUE_DRIVER, parts[1]);
	write_address(window + QUEUE_DEVICE, parts[2]);
	if (!fault(random, 24))
		write32(window + QUEUE_READY, 1);
}

static void slip(struct device *device, struct random *random)
{
	u64 window = device->window;

	switch (below(random, 6)) {
	case 0:	/* before its time */
		write32(window + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
		break;
	case 1:
		write32(window + STATUS, some_number(random));
		break;
	case 2:
		notify(device, below(random, 4));
		break;
	case 3:
		write32(window + DRIVER_FEATURES, some_number(random));
		break;
	case 4:
		write32(window + QUEUE_READY, below(random, 2));
		break;
	default:	/* a device's own configuration */
		write32(window + CONFIG + (below(random, 64) & ~3ul), some_number(random));
	}
}

void bring_up(struct device *device, struct random *random)
{
	u64 window = device->window, offered, wanted;
	u32 number, often = 1 + fault(random, 8);

	device->running = 0;
	device->started++;
	write32(window + STATUS, 0);
	device->id = read32(window + DEVICE_ID);	/* a spare window's comes and goes */
	device->queue_count = queues_of(device->id);
	write32(window + STATUS, ACKNOWLEDGE);
	write32(window + STATUS, ACKNOWLEDGE | DRIVER);
	offered = read_features(window);
	wanted = (offered & (next(random) | next(random))) | F_VERSION_1;
	if (fault(random, 16))
		wanted = some_number(random);
	if (fault(random, 8))
		slip(device, random);
	write32(window + DRIVER_FEATURES_SELECT, 0);
	write32(window + DRIVER_FEATURES, wanted);
	write32(window + DRIVER_FEATURES_SELECT, 1);
	write32(window + DRIVER_FEATURES, wanted >> 32);
	write32(window + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
	device->features = wanted;
	device->config = read32(window + CONFIG) | (u64)read32(window + CONFIG + 4) << 32;
	while (often--)	/* twice: the second time is not meant to be */
		for (number = 0; number < device->queue_count; number++)
			set_up_queue(device, number, random);
	if (fault(random, 8))
		slip(device, random);
	write32(window + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
	device->running = 1;
	if (one_in(random, 32))	/* once more, when it runs */
		set_up_queue(device, below(random, device->queue_count), random);
}

/* Counts what came back, and sees if the device has given up. */
void look_after(struct device *device)
{
	u32 number;
	u32 status = read32(device->window + STATUS);

	for (number = 0; number < device->queue_count; number++) {
		struct queue *queue = &device->queues[number];
		u16 used;

		if (!queue->size)
			continue;
		used = read16(device_ring(queue) + 2);
		if ((u16)(used - queue->used) <= queue->size)
			device->completed += (u16)(used - queue->used);
		queue->used = used;
	}
	if (status != (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)) {
		device->stopped += device->running && status & NEEDS_RESET;
		device->running = 0;
	}
}

void notify(struct device *device, u32 queue)
{
	write32(device->window + QUEUE_NOTIFY, queue);
}
