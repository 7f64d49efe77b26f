/* Load for a gateway, from one thread: requests in a closed loop, or many streams opened at once.
 *
 *   load PORT requests CONNECTIONS SECONDS BODY HEADERS       each connection asks again as soon as it has its answer
 *   load PORT streams COUNT ROUNDS BODY HEADERS               COUNT streams at once, ROUNDS times, each to its end
 *
 * BODY and HEADERS are files (headers end with CRLF each). One line of JSON: times in microseconds; `hash` is that of one stream's
 * bytes without their framing, `different` counts streams that had others.
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
#include <time.h>
#include <unistd.h>

#define MOST 8192
enum { HEAD, SIZE, DATA, AFTER, DONE };

struct conn {
    char in[65536];
    size_t have;
    int fd, at, busy, status;
    size_t chunk;
    unsigned long long hash;
    long long asked, last;
    int events, newline;
};

static struct conn conns[MOST];
static char *request;
static size_t request_size;
static int port, poller;
static double *times[3]; /* whole, first event, gap */
static size_t counts[3], rooms[3];
static long long ok, errors, all_events;

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void note(int kind, long long ns) {
    if (counts[kind] == rooms[kind]) times[kind] = realloc(times[kind], (rooms[kind] = rooms[kind] * 2 + 65536) * sizeof(double));
    times[kind][counts[kind]++] = ns / 1e3;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(int kind, double share) {
    if (!counts[kind]) return 0;
    qsort(times[kind], counts[kind], sizeof(double), compare);
    return times[kind][(size_t)(share * (counts[kind] - 1))];
}

static char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) perror(path), exit(1);
    char *data = calloc(1, 1 << 20);
    *size = fread(data, 1, (1 << 20) - 1, file);
    fclose(file);
    return data;
}

static void connect_to(struct conn *c) {
    int one = 1;
    struct sockaddr_in address = {AF_INET, htons(port), {htonl(INADDR_LOOPBACK)}, {0}};
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) perror("load: connect"), exit(1);
    struct epoll_event add = {EPOLLIN, {.ptr = c}};
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &add);
}

static void ask(struct conn *c) {
    c->have = c->at = c->events = c->newline = 0;
    c->busy = 1;
    c->hash = 1469598103934665603ULL;
    c->asked = now_ns();
    c->last = 0;
    if (write(c->fd, request, request_size) != (ssize_t)request_size) perror("load: write"), exit(1);
}

/* Bytes of the body of a stream: hash them, count the events. True if an event has ended in them. */
static int body(struct conn *c, const char *data, size_t size) {
    int ended = 0;
    for (size_t i = 0; i < size; i++) {
        c->hash = (c->hash ^ (unsigned char)data[i]) * 1099511628211ULL;
        if (data[i] == '\n' && c->newline) c->events++, ended = 1;
        c->newline = data[i] == '\n' && !c->newline;
    }
    return ended;
}

/* Takes what has come; 1 when the reply is complete. Knows Content-Length and chunks. */
static int take(struct conn *c, int streams, long long now) {
    size_t from = 0;
    int ended = 0;
    while (from < c->have && c->at != DONE) {
        char *data = c->in + from;
        size_t left = c->have - from;
        if (c->at == HEAD) {
            char *end = memmem(data, left, "\r\n\r\n", 4);
            if (!end) break;
            *end = 0;
            c->status = atoi(data + 9);
            char *length = strcasestr(data, "\ncontent-length:");
            c->chunk = length ? strtoul(length + 16, NULL, 10) : 0;
            c->at = length ? (c->chunk ? DATA : DONE) : SIZE;
            if (length) c->newline = 2; /* no framing behind it */
            from = end + 4 - c->in;
        } else if (c->at == SIZE) {
            char *end = memmem(data, left, "\r\n", 2);
            if (!end) break;
            c->chunk = strtoul(data, NULL, 16);
            from = end + 2 - c->in;
            c->at = c->chunk ? DATA : AFTER;
        } else if (c->at == DATA) {
            size_t part = left < c->chunk ? left : c->chunk;
            if (c->newline == 2) {
                c->chunk -= part;
                if (!c->chunk) c->at = DONE;
            } else {
                ended |= body(c, data, part);
                c->chunk -= part;
                if (!c->chunk) c->at = AFTER, c->chunk = 1;
            }
            from += part;
        } else { /* AFTER: the two bytes behind a chunk; `chunk` is 0 behind the last */
            if (left < 2) break;
            from += 2;
            c->at = c->chunk ? SIZE : DONE;
        }
    }
    memmove(c->in, c->in + from, c->have - from);
    c->have -= from;
    if (streams && ended) {
        note(c->last ? 2 : 1, now - (c->last ? c->last : c->asked));
        c->last = now;
    }
    return c->at == DONE;
}

int main(int count, char **words) {
    if (count != 7) return fprintf(stderr, "usage: load PORT requests|streams COUNT SECONDS|ROUNDS BODY HEADERS\n"), 2;
    int streams = !strcmp(words[2], "streams"), wanted = atoi(words[3]), limit = atoi(words[4]), round = 0, running = 0;
    size_t body_size, head_size;
    char *content = read_file(words[5], &body_size), *lines = read_file(words[6], &head_size);
    unsigned long long hash = 0;
    long long different = 0;
    port = atoi(words[1]);
    if (wanted > MOST) return fprintf(stderr, "load: at most %d connections\n", MOST), 2;
    request = malloc(body_size + head_size + 512);
    request_size = sprintf(request, "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n%s\r\n", port, body_size, lines);
    memcpy(request + request_size, content, body_size);
    request_size += body_size;
    poller = epoll_create1(0);
    for (int i = 0; i < wanted; i++) connect_to(&conns[i]);
    long long began = now_ns(), until = began + limit * 1000000000LL, last_progress = began;
    for (int i = 0; i < wanted; i++) ask(&conns[i]), running++;
    while (running) {
        struct epoll_event ready[512];
        int found = epoll_wait(poller, ready, 512, 1000);
        long long now = now_ns();
        if (found > 0) last_progress = now;
        else if (now - last_progress > 30000000000LL) return fprintf(stderr, "load: nothing came for 30 s, %d are open\n", running), 1;
        for (int i = 0; i < found; i++) {
            struct conn *c = ready[i].data.ptr;
            ssize_t got = read(c->fd, c->in + c->have, sizeof c->in - c->have);
            if (got <= 0) {
                errors += c->busy;
                running -= c->busy;
                c->busy = 0;
                close(c->fd);
                if (!streams && now < until) connect_to(c), ask(c), running++;
                continue;
            }
            c->have += got;
            if (!c->busy || !take(c, streams, now)) continue;
            c->busy = 0;
            running--;
            if (c->status == 200) ok++, note(0, now - c->asked);
            else errors++;
            if (streams) {
                all_events += c->events;
                if (!hash) hash = c->hash;
                different += c->hash != hash;
            } else if (now < until) ask(c), running++;
        }
        if (streams && !running && ++round < limit)
            for (int i = 0; i < wanted; i++) ask(&conns[i]), running++;
    }
    double seconds = (now_ns() - began) / 1e9;
    printf("{\"ok\":%lld,\"errors\":%lld,\"seconds\":%.3f,\"rate\":%.1f,\"p50\":%.1f,\"p99\":%.1f,\"events\":%lld,\"ttft_p50\":%.1f,\"ttft_p99\":%.1f,"
           "\"gap_p50\":%.1f,\"gap_p99\":%.1f,\"gap_max\":%.1f,\"hash\":\"%llx\",\"different\":%lld}\n",
           ok, errors, seconds, ok / seconds, quantile(0, .5), quantile(0, .99), all_events, quantile(1, .5), quantile(1, .99),
           quantile(2, .5), quantile(2, .99), quantile(2, 1), hash, different);
    return 0;
}
