/* Multiplies one pair of AMX tiles. Exits 0 if the result is right, 1 if the kernel refuses or the result is wrong;
 * dies by a signal where the processor reports AMX without having it. Run by Amx.cmake. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* arch_prctl: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
#endif

enum { ROWS = 16, COLUMN_BYTES = 64, PRODUCT_SUM = 64 * 2 * 3 };

struct tile_config {
    uint8_t  palette;
    uint8_t  start_row;
    uint8_t  reserved[14];
    uint16_t column_bytes[16];
    uint8_t  rows[16];
};

int main(void) {
#ifdef __linux__
    if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) != 0) {
        return 1;
    }
#endif
    struct tile_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 3; tile++) {
        config.column_bytes[tile] = COLUMN_BYTES;
        config.rows[tile]         = ROWS;
    }
    int8_t  left[ROWS][COLUMN_BYTES], right[ROWS][COLUMN_BYTES];
    int32_t product[ROWS][COLUMN_BYTES / 4];
    memset(left, 2, sizeof left);
    memset(right, 3, sizeof right);

    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_loadd(1, left, COLUMN_BYTES);
    _tile_loadd(2, right, COLUMN_BYTES);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, product, COLUMN_BYTES);
    _tile_release();

    for (int row = 0; row < ROWS; row++) {
        for (int column = 0; column < COLUMN_BYTES / 4; column++) {
            if (product[row][column] != PRODUCT_SUM) {
                return 1;
            }
        }
    }
    return 0;
}
