/* Whether a kernel takes page faults for what they are, and leaves registers alone; prints what is wrong. */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
static sigjmp_buf back;
static volatile int signal_got, code_got;
static void *volatile address_got;
static int wrong;

static void on_fault(int number, siginfo_t *info, void *context)
{
	signal_got = number;
	code_got = info->si_code;
	address_got = info->si_addr;
	siglongjmp(back, 1);
}

static void expect(const char *what, volatile char *where, int write, int signal_number, int code)
{
	signal_got = code_got = 0;
	if (!sigsetjmp(back, 1)) {
		if (write)
			*where = 7;
		else
			(void) *where;
	}
	if (signal_got != signal_number || (code && code_got != code) || (signal_number && address_got != where)) {
		printf("%s: signal %d code %d at %p, not %d code %d at %p\n", what, signal_got, code_got, address_got,
		       signal_number, code, where);
		wrong = 1;
	}
}

static char *pages(int count, int protection, int flags, int file)
{
	char *found = mmap(NULL, count * PAGE, protection, flags, file, 0);
	if (found == MAP_FAILED) {
		perror("mmap");
		exit(2);
	}
	return found;
}

static void faults(void)
{
	char name[] = "/tmp/memory-XXXXXX";
	int file = mkstemp(name);
	char *area, *shared, *hole;

	unlink(name);
	if (ftruncate(file, 2 * PAGE))
		exit(2);
	area = pages(8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	expect("reading fresh memory", area, 0, 0, 0);
	expect("writing fresh memory", area + PAGE, 1, 0, 0);
	mprotect(area, 2 * PAGE, PROT_READ);
	expect("writing what was made read-only", area + PAGE, 1, SIGSEGV, SEGV_ACCERR);
	expect("reading what was made read-only", area + PAGE, 0, 0, 0);
	mprotect(area, 2 * PAGE, PROT_NONE);
	expect("reading what was made inaccessible", area + PAGE, 0, SIGSEGV, SEGV_ACCERR);
	mprotect(area, 2 * PAGE, PROT_READ | PROT_WRITE);
	expect("writing what was made writable again", area + PAGE, 1, 0, 0);
	expect("fresh inaccessible memory", pages(1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1), 0, SIGSEGV, SEGV_ACCERR);
	expect("writing a fresh read-only mapping", pages(1, PROT_READ, MAP_PRIVATE, file), 1, SIGSEGV, SEGV_ACCERR);
	expect("writing a write-only mapping", pages(1, PROT_WRITE, MAP_SHARED, file), 1, 0, 0);
	shared = pages(3, PROT_READ | PROT_WRITE, MAP_SHARED, file);
	expect("reading beyond the end of the file", shared + 2 * PAGE, 0, SIGBUS, 0);
	shared[PAGE + 5] = 'x';
	if (pages(2, PROT_READ | PROT_WRITE, MAP_PRIVATE, file)[PAGE + 5] != 'x') {
		puts("what was written to a shared mapping is not in the file");
		wrong = 1;
	}
	hole = pages(3, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	munmap(hole + PAGE, PAGE);
	expect("where nothing is", hole + PAGE, 0, SIGSEGV, SEGV_MAPERR);
	area[3 * PAGE] = 1;
	if (!fork()) {
		area[3 * PAGE] = 2;
		_exit(area[3 * PAGE] != 2);
	}
	int status;
	wait(&status);
	if (status || area[3 * PAGE] != 1) {
		puts("memory of parent and child is not copied on writing");
		wrong = 1;
	}
}

/* Threads with values of their own in vector registers, which faults and system calls must not mix up. */
static void *registers(void *argument)
{
	double mine = 1 + (long) argument, out[8] = {0};
	int round, wide = __builtin_cpu_supports("avx512f");

	for (round = 0; round < 3000; round++) {
		char *fresh = pages(2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		double in[8] = {mine, 2 * mine, 3 * mine, 4 * mine, 5 * mine, 6 * mine, 7 * mine, round};
		long number = SYS_sched_yield;

		if (wide)
			asm volatile("vmovupd %3, %%zmm17\n\tsyscall\n\tmovb $1, (%2)\n\tmovb $1, 4096(%2)\n\tvmovupd %%zmm17, %0"
				     : "=m" (out), "+a" (number) : "r" (fresh), "m" (in) : "rcx", "r11", "memory");
		else
			asm volatile("movupd %3, %%xmm7\n\tsyscall\n\tmovb $1, (%2)\n\tmovb $1, 4096(%2)\n\tmovupd %%xmm7, %0"
				     : "=m" (out), "+a" (number) : "r" (fresh), "m" (in) : "rcx", "r11", "memory", "xmm7");
		if (memcmp(in, out, wide ? sizeof in : 16)) {
			printf("registers of thread %ld are lost in round %d\n", (long) argument, round);
			wrong = 1;
			break;
		}
		munmap(fresh, 2 * PAGE);
	}
	return NULL;
}

/* The clock as the C library reads it and by the system call: one goes on from where the other was. */
static void clocks(clockid_t clock)
{
	struct timespec now;
	int64_t last = 0, here;
	int round;

	for (round = 0; round < 20000; round++) {
		if (round % 3)
			clock_gettime(clock, &now);
		else
			syscall(SYS_clock_gettime, clock, &now);
		here = now.tv_sec * 1000000000LL + now.tv_nsec;
		if (here < last || (last && here - last > 20000000000LL)) {
			printf("clock %d goes from %lld to %lld\n", clock, (long long) last, (long long) here);
			wrong = 1;
			break;
		}
		last = here;
	}
}

int main(void)
{
	struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
	pthread_t threads[4];
	long each;

	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	faults();
	for (each = 0; each < 4; each++)
		pthread_create(&threads[each], NULL, registers, (void *) each);
	for (each = 0; each < 4; each++)
		pthread_join(threads[each], NULL);
	clocks(CLOCK_MONOTONIC);
	clocks(CLOCK_REALTIME);
	if (!wrong)
		puts("all is well");
	return wrong;
}
