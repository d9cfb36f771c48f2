/* Loaded before a user-mode-linux kernel: lets it run on processors with more register state than
   it was built for.

   Linux takes the extended state (PTRACE_SETREGSET, NT_X86_XSTATE) only as a whole. A kernel whose
   buffer ends before the processor's last feature (AMX, say) gets EFAULT and panics at its first
   switch. What it does not know of is read here first and handed back unchanged. */
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PEEK_FIRST = 1, PEEK_LAST = 3, GET_REGISTERS = 0x4204, SET_REGISTERS = 0x4205 };

long ptrace(int request, ...)
{
    va_list rest;
    va_start(rest, request);
    pid_t pid = va_arg(rest, pid_t);
    void *address = va_arg(rest, void *);
    void *data = va_arg(rest, void *);
    va_end(rest);

    if (request >= PEEK_FIRST && request <= PEEK_LAST) {
        /* The C library returns the word; the system call stores it. */
        long word;
        long result = syscall(SYS_ptrace, request, pid, address, &word);
        return result < 0 ? result : word;
    }
    if (request == SET_REGISTERS && (long)address == NT_X86_XSTATE) {
        static char state[1 << 16];
        struct iovec known = *(struct iovec *)data;
        struct iovec whole = {state, sizeof state};
        if (syscall(SYS_ptrace, GET_REGISTERS, pid, address, &whole) < 0)
            return -1;
        if (whole.iov_len > known.iov_len) {
            memcpy(state, known.iov_base, known.iov_len);
            return syscall(SYS_ptrace, SET_REGISTERS, pid, address, &whole);
        }
    }
    return syscall(SYS_ptrace, request, pid, address, data);
}
