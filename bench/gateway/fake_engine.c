/* A fake engine: answers like vLLM's API server as far as a gateway can see, at almost no cost, so that what is measured is the
 * gateway. One thread, epoll.
 *
 *   fake_engine PORT
 *
 * A reply of about 600 bytes, or a stream of events of 240 bytes. `GET /set?events=N&delay_us=N` says how many and how far apart.
 * Asked for usage (stream_options), it gives it as vLLM does: continuous_usage_stats in each event, include_usage in one of its own.
 * `/metrics` has vLLM's token counters, so that a bill can be compared with them.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_FD 65536
#define PROMPT 500 /* tokens that every prompt has */

struct conn {
    char *in;
    size_t have, room;
    int open, streaming, sent, usage, continuous; /* sent: events of the stream so far */
    long long due;                                /* when the next event is to go out, ns */
    int next;                                     /* the stream after this one in the queue, -1 at its end */
    char *out;                                    /* what the socket would not take yet */
    size_t left;
};

static struct conn conns[MAX_FD];
static int queue_head = -1, queue_tail = -1, events = 100, poller, timer;
static long long delay_ns = 10000000, generated, prompted;
static const char WORDS[] = "A word in the answer of a model that has all the time in the world to think about it and then says it.";

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void drop(int fd) {
    struct conn *c = &conns[fd];
    if (c->streaming) /* out of the queue, because the number will be another connection's */
        for (int before = -1, at = queue_head; at >= 0; before = at, at = conns[at].next)
            if (at == fd) {
                if (before < 0) queue_head = c->next;
                else conns[before].next = c->next;
                if (queue_tail == fd) queue_tail = before;
                break;
            }
    c->open = c->streaming = 0;
    c->have = c->left = 0;
    free(c->out);
    c->out = NULL;
    close(fd);
}

static void send_all(int fd, const char *data, size_t size) {
    struct conn *c = &conns[fd];
    ssize_t done = c->left ? 0 : write(fd, data, size);
    if (done < 0) {
        if (errno != EAGAIN) return;
        done = 0;
    }
    if ((size_t)done < size) { /* a slow reader: keep the rest until it reads on */
        c->out = realloc(c->out, c->left + size - done);
        memcpy(c->out + c->left, data + done, size - done);
        c->left += size - done;
        struct epoll_event want = {EPOLLIN | EPOLLOUT, {.fd = fd}};
        epoll_ctl(poller, EPOLL_CTL_MOD, fd, &want);
    }
}

static void flush_left(int fd) {
    struct conn *c = &conns[fd];
    ssize_t done = write(fd, c->out, c->left);
    if (done <= 0) return;
    memmove(c->out, c->out + done, c->left - done);
    c->left -= done;
    if (!c->left) {
        struct epoll_event want = {EPOLLIN, {.fd = fd}};
        epoll_ctl(poller, EPOLL_CTL_MOD, fd, &want);
    }
}

static int usage_text(char *to, int completion) {
    return sprintf(to, ",\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%d,\"completion_tokens\":%d}", PROMPT, PROMPT + completion, completion);
}

/* One event as a chunk; the last one has the reason of the end, and behind it come usage and [DONE]. */
static void send_event(int fd) {
    struct conn *c = &conns[fd];
    char event[512], chunk[1600];
    int last = ++c->sent == events;
    int size = sprintf(event,
                       "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"bench\",\"choices\":"
                       "[{\"index\":0,\"delta\":{\"content\":\" %.52s\"},\"logprobs\":null,\"finish_reason\":%s}]",
                       WORDS + c->sent % 40, last ? "\"stop\"" : "null");
    if (c->continuous) size += usage_text(event + size, c->sent);
    size += sprintf(event + size, "}\n\n");
    int length = sprintf(chunk, "%x\r\n%.*s\r\n", size, size, event);
    generated++;
    if (last) {
        if (c->usage) {
            size = sprintf(event, "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"bench\",\"choices\":[]");
            size += usage_text(event + size, events);
            size += sprintf(event + size, "}\n\n");
            length += sprintf(chunk + length, "%x\r\n%.*s\r\n", size, size, event);
        }
        length += sprintf(chunk + length, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
        c->streaming = 0;
    }
    send_all(fd, chunk, length);
}

static void enqueue(int fd, long long due) {
    conns[fd].due = due;
    conns[fd].next = -1;
    if (queue_tail < 0) queue_head = fd;
    else conns[queue_tail].next = fd;
    queue_tail = fd;
}

/* All streams have the same delay, so the queue is in order of time. */
static void run_queue(void) {
    long long now = now_ns();
    while (queue_head >= 0 && conns[queue_head].due <= now) {
        int fd = queue_head;
        queue_head = conns[fd].next;
        if (queue_head < 0) queue_tail = -1;
        if (!conns[fd].streaming) continue;
        send_event(fd);
        if (conns[fd].streaming) enqueue(fd, conns[fd].due + delay_ns);
    }
    struct itimerspec when = {{0, 0}, {0, 0}};
    if (queue_head >= 0) {
        long long wait = conns[queue_head].due;
        when.it_value.tv_sec = wait / 1000000000LL;
        when.it_value.tv_nsec = wait % 1000000000LL;
    }
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
}

static void answer(int fd, const char *type, const char *body) {
    char reply[2048];
    int size = snprintf(reply, sizeof reply, "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: %s\r\ncontent-length: %zu\r\n\r\n%s", type, strlen(body), body);
    send_all(fd, reply, size);
}

static void get(int fd, const char *path) {
    char page[1024];
    if (!strncmp(path, "/set?", 5)) {
        const char *found;
        if ((found = strstr(path, "events="))) events = atoi(found + 7);
        if ((found = strstr(path, "delay_us="))) delay_ns = atoll(found + 9) * 1000;
        answer(fd, "text/plain", "ok\n");
    } else if (!strncmp(path, "/v1/models", 10)) {
        answer(fd, "application/json", "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\",\"created\":1700000000,\"owned_by\":\"bench\",\"max_model_len\":32768}]}");
    } else if (!strncmp(path, "/metrics", 8)) {
        snprintf(page, sizeof page,
                 "# TYPE vllm:generation_tokens_total counter\nvllm:generation_tokens_total{model_name=\"bench\"} %lld\n"
                 "# TYPE vllm:prompt_tokens_total counter\nvllm:prompt_tokens_total{model_name=\"bench\"} %lld\n", generated, prompted);
        answer(fd, "text/plain; version=0.0.4", page);
    } else answer(fd, "text/plain", "");
}

static void post(int fd, const char *body) {
    struct conn *c = &conns[fd];
    prompted += PROMPT;
    if (strstr(body, "\"stream\": true") || strstr(body, "\"stream\":true")) {
        static const char head[] = "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
        c->streaming = 1;
        c->sent = 0;
        c->usage = strstr(body, "\"include_usage\":true") != NULL || strstr(body, "\"include_usage\": true") != NULL;
        c->continuous = strstr(body, "\"continuous_usage_stats\":true") != NULL || strstr(body, "\"continuous_usage_stats\": true") != NULL;
        send_all(fd, head, sizeof head - 1);
        if (delay_ns) {
            enqueue(fd, now_ns() + delay_ns);
            if (queue_head == fd) run_queue();
        } else while (c->streaming) send_event(fd);
        return;
    }
    char reply[1024];
    int size = sprintf(reply,
                       "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"bench\",\"choices\":[{\"index\":0,\"message\":"
                       "{\"role\":\"assistant\",\"content\":\"%s %s\",\"refusal\":null,\"tool_calls\":[]},\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}],"
                       "\"service_tier\":null,\"system_fingerprint\":null,\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%d,\"completion_tokens\":50,\"prompt_tokens_details\":null},"
                       "\"prompt_logprobs\":null}", WORDS, WORDS, PROMPT, PROMPT + 50);
    generated += 50;
    reply[size] = 0;
    answer(fd, "application/json", reply);
}

/* Answer each request that is complete. */
static void serve(int fd) {
    struct conn *c = &conns[fd];
    while (c->have && !c->streaming) {
        c->in[c->have] = 0;
        char *end = strstr(c->in, "\r\n\r\n");
        if (!end) return;
        char *length = strcasestr(c->in, "\r\ncontent-length:");
        size_t body = length && length < end ? strtoul(length + 17, NULL, 10) : 0, whole = end + 4 - c->in + body;
        if (c->have < whole) return;
        char kept = c->in[whole];
        c->in[whole] = 0;
        if (!strncmp(c->in, "GET ", 4)) get(fd, c->in + 4);
        else post(fd, end + 4);
        if (!c->open) return;
        c->in[whole] = kept;
        memmove(c->in, c->in + whole, c->have - whole);
        c->have -= whole;
    }
}

int main(int count, char **words) {
    if (count != 2) return fprintf(stderr, "usage: fake_engine PORT\n"), 2;
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {AF_INET, htons(atoi(words[1])), {htonl(INADDR_LOOPBACK)}, {0}};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) return perror("fake_engine"), 1;
    poller = epoll_create1(0);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event add = {EPOLLIN, {.fd = listener}}, ready[512];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &add);
    add.data.fd = timer;
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &add);
    for (;;) {
        int found = epoll_wait(poller, ready, 512, -1);
        for (int i = 0; i < found; i++) {
            int fd = ready[i].data.fd;
            struct conn *c = &conns[fd];
            if (fd == listener) {
                int client;
                while ((client = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    add = (struct epoll_event){EPOLLIN, {.fd = client}};
                    epoll_ctl(poller, EPOLL_CTL_ADD, client, &add);
                    conns[client].open = 1;
                }
                continue;
            }
            if (fd == timer) {
                long long expirations;
                if (read(timer, &expirations, sizeof expirations) > 0) run_queue();
                continue;
            }
            if (c->left && ready[i].events & EPOLLOUT) flush_left(fd);
            if (!(ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) continue;
            if (c->room - c->have < 65536) c->in = realloc(c->in, c->room = c->have + 262144);
            ssize_t got = read(fd, c->in + c->have, c->room - c->have - 1);
            if (got <= 0) {
                if (got == 0 || errno != EAGAIN) drop(fd);
                continue;
            }
            c->have += got;
            serve(fd);
        }
    }
}
